"""Central differences: two queries a direction, at theta + eps z and theta - eps z (MeZO)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.estimators.base import FiniteDifference, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


def projected_grad(loss_plus: Tensor, loss_minus: Tensor, eps: float) -> Tensor:
    """Central difference of the objective along each direction.

    g_q = (L(theta + eps z_q) - L(theta - eps z_q)) / (2 eps);  E[g z] = grad L(theta) + O(eps^2) for z ~ N(0, I).

    Args:
        loss_plus: L(theta + eps z_q), shape [Q], float32, nats per token.
        loss_minus: L(theta - eps z_q), shape [Q], float32, nats per token.
        eps: radius eps > 0, in units of the weights.

    Returns:
        g, shape [Q], float32; non-finite entries are left in, the guard decides.

    Example:
        >>> import torch
        >>> projected_grad(torch.tensor([1.2]), torch.tensor([1.0]), eps=0.1)
        tensor([1.0000])

    References: Spall 1992 (SPSA); Malladi et al. 2023 (MeZO), Definition 1.
    """
    # p = (L(theta + eps z) - L(theta - eps z)) / (2 eps) = z^T grad L + O(eps^2)
    return (loss_plus - loss_minus) / (2 * eps)


@dataclass
class Central(FiniteDifference):
    """Central differences, averaged over directions: 2 q queries a step, bias O(eps^2).

    References: Malladi et al. 2023 (MeZO), Definition 1 and Algorithm 2 (n-SPSA).
    """

    @property
    def num_queries(self) -> int:
        """Two a direction."""
        return 2 * self.num_directions

    def points(self, directions: list[Direction]) -> list[Point]:
        """+eps then -eps along each direction: MeZO's order, one move of the weights between the two."""
        # the pair of a direction stands together: what is kept for z serves both
        return [Point(direction, sign * self.eps) for direction in directions for sign in (1.0, -1.0)]

    def projected_grads(self, losses: Tensor) -> Tensor:
        """(L+ - L-) / 2 eps, [Q]."""
        pairs = self.probe_losses(losses)
        return projected_grad(pairs[:, 0], pairs[:, 1], self.eps)

    def probe_losses(self, losses: Tensor) -> Tensor:
        """[L+, L-] of each direction, [Q, 2]."""
        # [2 q] -> [q, 2]: plus and minus of each direction, as points() has them
        return losses.view(self.num_directions, 2)

    def loss(self, losses: Tensor) -> Tensor:
        """The mean over both sides: the clean loss up to O(eps^2)."""
        # (L+ + L-) / 2 = L(theta) + eps^2 z^T H z / 2 + O(eps^4)
        return losses.mean()
