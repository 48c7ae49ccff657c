"""The interface of estimators that query some points at earlier weights, the anchor."""

from __future__ import annotations


class KeepsAnchor:
    """An estimator that asks at a copy of the trained weights, made anew now and then."""

    def batches_at(self, step: int) -> int:
        """Batches over which the losses are averaged in a step that makes an anchor; 0 in the others."""
        raise NotImplementedError
