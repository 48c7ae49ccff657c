"""Slopes clipped before they are averaged (QZO)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor
from zoft.weightings.base import Gram, Weighting


@dataclass
class Clip(Weighting):
    """a_j = clip(p_j, -bound, bound) / q: one loss that is far off moves the weights by a bounded step.

    Args:
        bound: largest slope that counts, > 0. A slope is about as large as the gradient is long (the log's
            ``projected_grad``).

    References: QZO (arXiv 2505.13430), directional derivative clipping.
    """

    bound: float = 100.0

    def check(self) -> None:
        """Refuse a bound that lets nothing through."""
        self.require(0 < self.bound < float("inf"), "bound", "> 0 and finite")

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """Clipped p / q."""
        del gram, state
        # a_j = clip(p_j, -bound, bound) / q
        return measured.projected_grads.clamp(-self.bound, self.bound) / len(measured.projected_grads)
