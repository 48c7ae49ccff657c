"""Leave-one-out: each direction's loss against the mean of the others', without a clean query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.estimators.base import FiniteDifference, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


@dataclass
class LeaveOneOut(FiniteDifference):
    """One side of each direction, against the mean of the others' losses: q queries a step, no clean one.

    g_j = (L_j - 1 / (q - 1) sum_{k != j} L_k) / eps with L_j = L(theta + eps z_j): the others' mean stands where
    ``one_sided`` has L(theta). It is independent of z_j, so the mean of g_j z_j is that of one-sided differences; it is
    noisier than L(theta) by the others' own slopes, 1 / (q - 1) of the variance of one direction.

    Where directions come in pairs z, -z the partner is not independent: the sum over a pair is a central difference
    then, and the factor q / (q - 1) is left out, which keeps the estimate unbiased.

    Args:
        num_directions: directions per step, q >= 2.

    References: Kool et al. 2019 (REINFORCE leave-one-out), equation (3); LOREN (arXiv 2511.07971) for fine-tuning.
    """

    measures_slopes: ClassVar[bool] = False

    num_directions: int = 4

    def check(self) -> None:
        """Refuse a single direction: it has no others."""
        # first, as the base's message would say that one direction is enough
        self.require(self.num_directions >= 2, "num_directions", "at least 2")
        super().check()

    @property
    def num_queries(self) -> int:
        """One a direction."""
        return self.num_directions

    def points(self, directions: list[Direction]) -> list[Point]:
        """+eps along each direction."""
        return [Point(direction, self.eps) for direction in directions]

    def projected_grads(self, losses: Tensor) -> Tensor:
        """(L_j - mean_k L_k) / eps * q / (q - 1), which is L_j against the mean of the others: [Q]."""
        q = self.num_directions
        # L_j - mean of the others = (L_j - mean of all) q / (q - 1)
        factor = 1.0 if self.across == "antithetic" else q / (q - 1)
        # p_j = (L_j - 1 / (q - 1) sum_{k != j} L_k) / eps
        return (losses - losses.mean()) * (factor / self.eps)

    def probe_losses(self, losses: Tensor) -> Tensor:
        """L_j of each direction, [Q, 1]."""
        return losses.unsqueeze(1)

    def loss(self, losses: Tensor) -> Tensor:
        """The mean over the perturbed points: the clean loss up to a slope that is zero on average, and O(eps^2)."""
        return losses.mean()
