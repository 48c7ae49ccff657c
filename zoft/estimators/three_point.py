"""Three points: central differences, and the curvature along each direction from the clean loss between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zoft.component import Memory
from zoft.estimators._optional import MeasuresCurvature
from zoft.estimators.base import Measured, Point
from zoft.estimators.central import Central
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


@dataclass
class ThreePoint(MeasuresCurvature, Central):
    """Central differences and second differences, with one clean query for all directions: 2 q + 1 queries a step.

    g_j = (L+_j - L-_j) / (2 eps) as in ``central``, and k_j = (L+_j - 2 L(theta) + L-_j) / eps^2, which is
    z_j^T H z_j + O(eps^2). The losses' own rounding is divided by eps^2 in it: about 1e-7 / eps^2 for float32.

    References: Zhao et al. 2024 (HiZOO), equation (5); 1.5-SPSA (arXiv 2609.38095).
    """

    @property
    def num_queries(self) -> int:
        """Two a direction and the clean one."""
        return 2 * self.num_directions + 1

    def points(self, directions: list[Direction]) -> list[Point]:
        """The clean point, then +eps and -eps along each direction."""
        return [Point(), *(Point(direction, sign * self.eps) for direction in directions for sign in (1.0, -1.0))]

    def measure(self, losses: Tensor, state: Memory | None = None) -> Measured:
        """Slopes, and second differences [Q]."""
        return replace(super().measure(losses, state), curvatures=self.curvatures(losses))

    def curvatures(self, losses: Tensor) -> Tensor:
        """((L+ - L) + (L- - L)) / eps^2, [Q]: near numbers are subtracted first, which is exact."""
        # k_j = (L+_j - 2 L(theta) + L-_j) / eps^2 = z_j^T H z_j + O(eps^2)
        return (self.probe_losses(losses) - losses[0]).sum(1) / self.eps**2

    def probe_losses(self, losses: Tensor) -> Tensor:
        """[L+, L-] of each direction, [Q, 2]."""
        return losses[1:].view(self.num_directions, 2)

    def loss(self, losses: Tensor) -> Tensor:
        """The clean loss."""
        # L(theta) itself, which the points' mean would miss by eps^2 z^T H z / 2
        return losses[0]
