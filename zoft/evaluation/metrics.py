"""Metrics of what an objective predicts, with their intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from zoft.evaluation.intervals import mean_of_numbers, mean_of_scores, wilson

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
        >>> told = answers(EvalPrediction(predictions=numpy.array([[0.5, 0.0], [1.0, 1.0]]), label_ids=None))
        >>> told["f1"], told["exact_match"], round(told["exact_match_low"], 3)
        (0.75, 0.5, 0.095)
    """
    told: dict[str, float] = {}
    for name, column in zip(("f1", "exact_match"), numpy.asarray(prediction.predictions, dtype=float).T, strict=True):
        low, high = mean_of_scores(column.tolist())
        told |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
    return told


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
