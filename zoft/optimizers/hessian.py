"""Directions and steps scaled by a running estimate of the Hessian's diagonal (HiZOO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.estimators._optional import require_curvature
from zoft.optimizers.base import Estimate, Optimizer, State
from zoft.utils.lazy import Tensor


@dataclass
class Hessian(Optimizer):
    """Directions z' = z / sqrt(H) and the step sum_j a_j z'_j, with H a running diagonal of the Hessian.

    H <- (1 - smooth) H + smooth * mean_j |k_j| / 2 * H^2 z'_j^2, with k_j = z'_j^T (Hessian) z'_j as measured by second
    differences: that is the paper's |L+ + L- - 2 L0| / (2 eps^2) * H z^2, as z^2 = H z'^2. H starts at 1, where z' = z,
    and stays positive. One float32 number per coordinate.

    What H comes to: for a positive diagonal Hessian A, E[k z^2] = 2 A / H + t with t = sum A / H, so that the rule
    stands still at H = (1 + d / 2) A. The shape is A's; its scale makes the curvature along a direction about 2, so
    that steps shorten where the loss bends, and the learning rate is no longer MeZO's once H has moved. (The paper's
    Lemma has z^2 - 1 for z^2 and is unbiased, but is negative half of the time.)

    The published code takes the step with the new H along directions that were drawn with the old one; here the
    direction applied is the one measured, and H changes afterwards. With H in float32, what a step adds is lost where
    smooth |k| z^2 / 2 is less than 6e-8. H is not linear in the estimates: when the subspace changes its basis it
    stays as it is.

    Args:
        smooth: weight of a step in H, in (0, 1); 1e-6 ... 1e-12 in the paper.

    References: Zhao et al. 2025 (HiZOO, arXiv 2402.15173), Algorithm 1.
    """

    shapes_directions: ClassVar[bool] = True
    uses_directions: ClassVar[str] = "shapes directions"
    start_values: ClassVar[dict[str, float]] = {"hessian": 1.0}

    smooth: float = 1e-6

    def check(self) -> None:
        """Refuse a weight outside (0, 1)."""
        super().check()
        self.require(0 < self.smooth < 1, "smooth", "above 0 and below 1")

    def check_with(self, method: Any) -> None:
        """Refuse estimators that measure no curvature."""
        require_curvature(f"optimizer={self.name()}", method)

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The diagonal."""
        return {"hessian": shape}

    def shape(self, z: Tensor, state: State, context: Any) -> Tensor:
        """z / sqrt(H)."""
        del context
        # z' = z / sqrt(H)
        return z.div_(state["hessian"].sqrt())

    def update_from(self, estimate: Estimate, state: State, step: int) -> Tensor:
        """The estimate along the directions that were measured; H takes their curvature in."""
        del step
        # three_point measures it: check_with has seen to that
        assert estimate.curvatures is not None, "the estimator has to measure the curvature"
        # both are drawn before H is written: the directions of this piece depend on it
        gradient = estimate.gradient()
        # |k_j| / (2 q), with k_j = z'_j^T (Hessian) z'_j
        shares = [abs(curvature) / (2 * len(estimate.curvatures)) for curvature in estimate.curvatures]
        directions = [direction for direction, _ in estimate.terms]
        bend = estimate.squares(list(zip(directions, shares, strict=True)))
        hessian = state["hessian"]
        # H <- (1 - smooth) H + smooth * bend * H^2 = H ((1 - smooth) + smooth * bend * H)
        factor = bend.mul_(hessian).mul_(self.smooth).add_(1 - self.smooth)
        hessian.mul_(factor).clamp_(_SMALLEST, _LARGEST)
        return gradient


_SMALLEST, _LARGEST = 1e-30, 1e30  # far from where 1 / sqrt(H) or H^2 leaves float32
