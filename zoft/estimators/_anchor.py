"""What an estimator promises of which some points start from earlier weights, the anchor."""

from __future__ import annotations

from zoft.estimators.base import Estimator


class KeepsAnchor:
    """An estimator that asks at a copy of the trained weights, made anew now and then."""

    def batches_at(self, step: int) -> int:
        """Batches over which the losses are averaged in a step that makes an anchor; 0 in the others."""
        raise NotImplementedError


def anchor_batches(estimator: Estimator, step: int) -> int:
    """Batches over which the losses of this step are averaged because it makes an anchor; 0: the step's own batch.

    Args:
        estimator: any.
        step: from 0.
    """
    return estimator.batches_at(step) if isinstance(estimator, KeepsAnchor) else 0
