"""Metrics of what an objective predicts, with their intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

from zoft.lm.metrics.intervals import mean_of_numbers, mean_of_scores, wilson

if TYPE_CHECKING:
    from transformers import EvalPrediction


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose best-scored option is the gold one, with its 95 % Wilson interval.

    Args:
        prediction: ``predictions`` [N, O] option scores, ``label_ids`` [N] gold indices.

    Returns:
        accuracy, accuracy_low and accuracy_high in [0, 1]; the first of equal scores wins, as in MeZO.

    Example:
        >>> from transformers import EvalPrediction
        >>> scores = numpy.array([[0.0, 1.0], [2.0, 1.0]])
        >>> accuracy(EvalPrediction(predictions=scores, label_ids=numpy.array([1, 1])))["accuracy"]
        0.5
    """
    scores, gold = numpy.asarray(prediction.predictions), numpy.asarray(prediction.label_ids)
    hits = int((scores.argmax(axis=1) == gold).sum())
    low, high = wilson(hits, len(gold))
    return {"accuracy": hits / len(gold), "accuracy_low": low, "accuracy_high": high}


def answers(prediction: EvalPrediction) -> dict[str, float]:
    """Mean F1 and exact match of generated answers, with 95 % intervals.

    Args:
        prediction: ``predictions`` [N, 2], each row's F1 and exact match.

    Returns:
        f1, exact_match, and of each ``_low`` and ``_high``; in [0, 1].

    Example:
        >>> from transformers import EvalPrediction
        >>> values = answers(EvalPrediction(predictions=numpy.array([[0.5, 0.0], [1.0, 1.0]]), label_ids=None))
        >>> values["f1"], values["exact_match"], round(values["exact_match_low"], 3)
        (0.75, 0.5, 0.095)
    """
    values: dict[str, float] = {}
    for name, column in zip(("f1", "exact_match"), numpy.asarray(prediction.predictions, dtype=float).T, strict=True):
        low, high = mean_of_scores(column.tolist())
        values |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
    return values


def reward(prediction: EvalPrediction) -> dict[str, float]:
    """Mean reward with its 95 % interval.

    Args:
        prediction: ``predictions`` [N].

    Example:
        >>> from transformers import EvalPrediction
        >>> reward(EvalPrediction(predictions=numpy.array([0.0, 1.0, 1.0, 0.0]), label_ids=None))["reward"]
        0.5
    """
    values = numpy.asarray(prediction.predictions, dtype=float)
    low, high = mean_of_numbers(values.tolist())
    return {"reward": float(values.mean()), "reward_low": low, "reward_high": high}


# ---- The held-out loss of texts, per token, with its interval, and the perplexity ------------------------------------


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss of all tokens that count, whatever the batches were, and e to the power of it.

    The interval is that of a ratio of sums over rows (the delta method), because the tokens of a row hang together:
    se = sqrt(n / (n - 1) * sum_i (l_i - loss * c_i)^2) / sum_i c_i.

    Args:
        prediction: ``predictions`` [N] each row's sum of losses l_i, nats; ``label_ids`` [N] how many tokens c_i.

    Returns:
        loss, loss_low and loss_high (95 %), nats per token, and perplexity.

    Example:
        >>> from transformers import EvalPrediction
        >>> values = perplexity(EvalPrediction(predictions=numpy.array([2.0, 6.0]), label_ids=numpy.array([1, 3])))
        >>> values["loss"], values["loss_low"], round(values["perplexity"], 3)
        (2.0, 2.0, 7.389)

    References: Cochran 1977, Sampling Techniques, chapter 6 (ratio estimators).
    """
    sums = numpy.asarray(prediction.predictions, dtype=numpy.float64)
    counts = numpy.asarray(prediction.label_ids, dtype=numpy.float64)
    loss, rows = float(sums.sum() / counts.sum()), len(sums)
    spread = math.sqrt(float(((sums - loss * counts) ** 2).sum()) * rows / max(1, rows - 1)) / float(counts.sum())
    half = 1.959963984540054 * spread if rows > 1 else math.inf
    return {
        "loss": loss,
        "loss_low": max(0.0, loss - half),
        "loss_high": loss + half,
        "perplexity": math.exp(min(loss, 700.0)),
    }
