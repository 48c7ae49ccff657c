"""Slopes damped where the curvature along their direction is high (1.5-SPSA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.component import Memory
from zoft.estimators._optional import require_curvature
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor
from zoft.weightings.base import Gram, Weighting


@dataclass
class Curvature(Weighting):
    """a_j = w_j p_j / q with w_j = 1 / max(floor, |k_j|^alpha), k_j the second difference along direction j.

    With the learning rate equal to eps (``estimator.eps_schedule=tied`` keeps it so) this is the paper's step
    1 / (2 q) sum_j (L+_j - L-_j) w_j z_j.

    Args:
        alpha: how much curvature counts, >= 0; 0 not at all.
        floor: curvatures below floor^(1 / alpha) do not count, > 0 (the paper's lambda_reg).

    References: 1.5-SPSA (arXiv 2609.38095), Algorithm 1.
    """

    alpha: float = 0.1
    floor: float = 1.0

    def check(self) -> None:
        """Refuse negative values."""
        self.require(0 <= self.alpha < float("inf"), "alpha", ">= 0 and finite")
        self.require(0 < self.floor < float("inf"), "floor", "> 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse estimators that measure no curvature."""
        require_curvature(f"weighting={self.name()}", method)

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """w p / q."""
        del gram, state
        slopes, curvatures = measured.projected_grads, measured.curvatures
        # check_with has seen to an estimator that measures it
        assert curvatures is not None
        # a_j = p_j / (q max(floor, |k_j|^alpha))
        return slopes / (curvatures.abs().pow(self.alpha).clamp_min(self.floor) * len(slopes))
