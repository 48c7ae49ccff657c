"""The forward gradient: exact directional derivatives, the noise-free end of every finite difference."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.estimators.base import Estimator, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


@dataclass
class ForwardGradient(Estimator):
    """Exact Jacobian-vector products: g_q = z_q^T grad L(theta), no eps; E[g z] = grad L(theta) exactly.

    One forward-mode pass carries a value and a tangent through every operation, about the work of two forward passes,
    so it is counted as two queries; the clean loss comes with it for nothing. Needs an engine with exact derivatives
    (``engine=forward_mode``, chosen by ``engine=auto``).

    References: Baydin et al. 2022 (Gradients without Backpropagation), Definition 1.
    """

    @property
    def num_queries(self) -> int:
        """Two a direction: value and tangent."""
        return 2 * self.num_directions

    def points(self, directions: list[Direction]) -> list[Point]:
        """The clean point (it comes with the first pass), then a derivative along each direction."""
        # the first dual pass has L(theta) in its other half: the clean point costs nothing
        return [Point(), *(Point(direction, derivative=True) for direction in directions)]

    def projected_grads(self, losses: Tensor) -> Tensor:
        """The derivatives themselves, [Q]."""
        # already z_j^T grad L: a derivative is asked for, not a difference
        return losses[1:]

    def loss(self, losses: Tensor) -> Tensor:
        """The clean loss."""
        # the value half of the dual number
        return losses[0]
