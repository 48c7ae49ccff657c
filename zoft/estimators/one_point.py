"""One point: a loss alone, or against the one of the step before (residual feedback); one query a direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.component import Memory
from zoft.estimators.base import FiniteDifference, Measured, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor, torch


@dataclass
class OnePoint(FiniteDifference):
    """One query a direction, against the loss of the step before: noisier than pairs at equal queries, for comparison.

    g_t = (L(theta_t + eps z_t) - L(theta_{t-1} + eps z_{t-1})) / eps. What is taken away is independent of z_t, so the
    mean of g_t z_t is that of one-sided differences. It also holds how far the weights and the batch have gone since,
    divided by eps: that part of the variance grows without bound as eps goes to 0. The first step has no past: its
    slopes are zero and nothing moves.

    Without feedback it is the textbook's g_t = L(theta_t + eps z_t) / eps. Its mean is the same, and its variance holds
    d L(theta)^2 / eps^2 for the level of the loss itself, which says nothing of its slope (docs/mathematics.md).

    Args:
        eps: finite-difference radius, in units of the weights; larger ones than for two points are better here.
        feedback: whether the loss of the step before is taken away.

    References: Zhang et al. 2022 (residual feedback), equation (4); Malladi et al. 2023 (MeZO), Table 11; without
    feedback, Flaxman, Kalai & McMahan 2005 (online convex optimization in the bandit setting), Lemma 2.1.
    """

    measures_slopes: ClassVar[bool] = False

    feedback: bool = True

    @property
    def num_queries(self) -> int:
        """One a direction."""
        return self.num_directions

    def points(self, directions: list[Direction]) -> list[Point]:
        """+eps along each direction."""
        return [Point(direction, self.eps) for direction in directions]

    def init(self) -> Memory:
        """The losses of the last step, none before the first."""
        return {"losses": []}

    def measure(self, losses: Tensor, state: Memory | None = None) -> Measured:
        """Each direction's loss against the loss that stood in its place in the step before."""
        state = self.init() if state is None else state
        if not self.feedback:
            return super().measure(losses)
        # the first step has no past: it is compared with itself, and its slopes are zero
        past = torch.tensor(state["losses"], dtype=losses.dtype) if state["losses"] else losses
        # by place: direction j of this step against direction j of the last one
        state["losses"] = losses.tolist()
        # g_t = (L(theta_t + eps z_t) - L(theta_{t-1} + eps z_{t-1})) / eps
        return Measured((losses - past) / self.eps, self.loss(losses), self.probe_losses(losses), self.eps)

    def projected_grads(self, losses: Tensor) -> Tensor:
        """Zeros where there is no earlier loss; without feedback L+ / eps: [Q]."""
        # g = L+ / eps: E[g z] = grad L + O(eps), with a variance of about d L^2 / eps^2
        return torch.zeros_like(losses) if self.feedback else losses / self.eps

    def probe_losses(self, losses: Tensor) -> Tensor:
        """L+ of each direction, [Q, 1]."""
        return losses.unsqueeze(1)

    def loss(self, losses: Tensor) -> Tensor:
        """The mean over the perturbed points: the clean loss up to a slope that is zero on average, and O(eps^2)."""
        return losses.mean()
