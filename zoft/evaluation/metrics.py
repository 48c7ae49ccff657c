"""Metrics of option scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from zoft.evaluation.intervals import wilson

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
