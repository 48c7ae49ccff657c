"""The projection of the gradient on the span of the step's directions, from their inner products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.component import Memory
from zoft.errors import UserError
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings.base import Gram, Weighting


@dataclass
class Align(Weighting):
    """a = (G + ridge tr(G) / q I)^-1 p, G_ij = <z_i, z_j>: of all sums of directions the nearest to the gradient.

    The slopes are p = Z^T grad L, so Z (Z^T Z)^-1 p = Z (Z^T Z)^-1 Z^T grad L. For q independent directions of d
    weights, q << d, G is about d I and this is the mean times q / d: a learning rate that fits ``mean`` is multiplied
    by d / q here. It differs from that where directions are correlated or fill their space (few coordinates, q near
    d): then it reaches the gradient itself, at a learning rate like that of gradient descent. Where directions depend
    on each other (pairs z, -z) it is the shortest of the solutions. One more pass over the directions, for G.

    Args:
        ridge: what is added to G's diagonal, as a share of its mean, >= 0.

    References: ZO-Align in Multi-Query Paradox (arXiv 2509.15552), in this form as a least-squares problem.
    """

    asks_gram: ClassVar[bool] = True

    ridge: float = 1e-6

    def check(self) -> None:
        """Refuse a negative ridge."""
        self.require(0 <= self.ridge < float("inf"), "ridge", ">= 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse estimators without slopes."""
        refuse_no_slopes(self, method)

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """The solution in float64, rounded once; nothing moves where no direction does."""
        del state
        slopes, products = measured.projected_grads, gram().double().cpu()
        mean = products.diagonal().mean()
        # products that are not finite end the step; no direction that moves at all leaves it where it is
        if not bool(torch.isfinite(products).all()) or not float(mean):
            return torch.zeros_like(slopes) if not float(mean) else torch.full_like(slopes, torch.nan)
        # G + ridge tr(G) / q I
        ridged = products + self.ridge * mean * torch.eye(len(slopes), dtype=torch.float64)
        # a = (...)^-1 p; the pseudo-inverse takes the shortest solution where directions depend on each other
        return (torch.linalg.pinv(ridged, hermitian=True) @ slopes.double()).to(slopes.dtype)


def refuse_no_slopes(weighting: Weighting, method: Any) -> None:
    """Refuse an estimator whose projected gradients are not the slopes along their directions."""
    estimator = method.estimator
    if not estimator.measures_slopes:
        raise UserError(
            f"weighting={weighting.name()} needs the slope along each direction, and estimator={estimator.name()} is "
            "right on average only: use estimator=central or one_sided"
        )
