"""The held-out loss of texts, per token, with its interval, and the perplexity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from transformers import EvalPrediction


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
        >>> told = perplexity(EvalPrediction(predictions=numpy.array([2.0, 6.0]), label_ids=numpy.array([1, 3])))
        >>> told["loss"], told["loss_low"], round(told["perplexity"], 3)
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
