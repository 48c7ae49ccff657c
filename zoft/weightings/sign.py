"""The sign of each slope: steps of one length (ZO-SGD-Sign)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings.base import Gram, Weighting


@dataclass
class Sign(Weighting):
    """a_j = sign(p_j) / q: the sign of the slope along a direction, not of the step's elements; a tie moves nothing.

    References: Zhang et al. 2024 (ZO-Bench, arXiv 2402.11592), ZO-SGD-Sign as in its code; Liu et al. 2019 (signSGD via
    zeroth-order oracle) takes the sign element by element, which is ``optimizer=sign``.
    """

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """sign(p) / q."""
        del gram, state
        slopes = measured.projected_grads
        signs = torch.where(slopes.isfinite(), slopes.sign(), slopes)  # torch's sign of NaN is 0
        # a_j = sign(p_j) / q
        return signs / len(slopes)
