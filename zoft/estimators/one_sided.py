"""One-sided differences: one clean query shared by any number of directions."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.estimators.base import FiniteDifference, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


@dataclass
class OneSided(FiniteDifference):
    """Forward differences against a shared clean loss: q + 1 queries a step, bias O(eps).

    g_q = (L(theta + eps z_q) - L(theta)) / eps.

    References: Nesterov & Spokoiny 2017, equation (22) (random gradient-free oracle).
    """

    @property
    def num_queries(self) -> int:
        """One a direction and the clean one."""
        return self.num_directions + 1

    def points(self, directions: list[Direction]) -> list[Point]:
        """The clean point, then +eps along each direction."""
        # the clean point first: one L(theta) serves all directions
        return [Point(), *(Point(direction, self.eps) for direction in directions)]

    def projected_grads(self, losses: Tensor) -> Tensor:
        """(L+ - L) / eps, [Q]."""
        # p_j = (L(theta + eps z_j) - L(theta)) / eps = z_j^T grad L + O(eps)
        return (losses[1:] - losses[0]) / self.eps

    def probe_losses(self, losses: Tensor) -> Tensor:
        """L+ of each direction, [Q, 1]."""
        return losses[1:].unsqueeze(1)

    def loss(self, losses: Tensor) -> Tensor:
        """The clean loss."""
        return losses[0]
