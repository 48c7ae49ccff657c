"""Variance-reduced differences: a batch's slope now minus the same at an anchor, plus the anchor's own (MeZO-SVRG)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zoft.component import Memory
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import FiniteDifference, Measured, Point
from zoft.estimators.central import projected_grad
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor

Terms = list[tuple[Direction, float]]


@dataclass
class SVRG(KeepsAnchor, FiniteDifference):
    """Central differences with a control variate at anchor weights: 4 q queries a step, and a copy of the weights.

    Every ``interval`` steps the weights become the anchor, and the estimate G is made over ``anchor_batches`` batches
    of the training data: 2 q anchor_batches queries. In the steps between, along the same z on the step's batch,

        g = (slope at theta - slope at the anchor) z + G:

    what the batch's choice adds to both slopes cancels, the nearer theta is to the anchor. G is kept as its directions
    and coefficients. The noise of the directions themselves is not reduced: it is that of G in all of these steps.
    Steps without an anchor (the one that should have made it was skipped) are plain central differences.

    Args:
        interval: steps from one anchor to the next, at least 2 (the paper's q).
        anchor_batches: batches over which an anchor's estimate is averaged, at least 1; the paper takes all the data.

    References: Gautam et al. 2024 (MeZO-SVRG, arXiv 2404.08080), Algorithm 2; one learning rate here, two there.
    """

    interval: int = 2
    anchor_batches: int = 4

    def check(self) -> None:
        """Refuse counts that leave no ordinary step or no batch, and directions that depend on the step's others."""
        super().check()
        self.require(self.interval >= 2, "interval", "at least 2")
        self.require(self.anchor_batches >= 1, "anchor_batches", "at least 1")
        if self.across == "orthogonal":
            raise UserError(
                f"{self.name()}.across=orthogonal: the anchor's directions are made again in other steps, and these "
                "take all of their step's directions each time: use iid or antithetic"
            )

    def check_with(self, method: Any) -> None:
        """Refuse parts under which an earlier step's directions and coefficients say something else."""
        subspace, weighting, optimizer = method.subspace, method.weighting, method.optimizer
        # the anchor's terms name directions of earlier steps: they must mean the same moves now
        if subspace.changes_basis or hasattr(subspace, "interval"):
            raise UserError(
                f"estimator={self.name()} takes up the directions of earlier steps, and subspace={subspace.name()} "
                "goes on to others: use subspace=full"
            )
        # c_j of the anchor and of this step are added, and must be in one unit
        if weighting.name() != "mean":
            raise UserError(
                f"estimator={self.name()} adds coefficients of several steps, and weighting={weighting.name()} changes "
                "their scale from step to step: use weighting=mean"
            )
        if optimizer.shapes_directions:
            raise UserError(
                f"estimator={self.name()} takes up the directions of earlier steps, and optimizer={optimizer.name()} "
                "shapes them by its state, which has changed since: use optimizer=sgd"
            )

    @property
    def num_queries(self) -> int:
        """Two a direction at theta, and two at the anchor."""
        return 4 * self.num_directions

    def queries_at(self, step: int) -> int:
        """A step that makes an anchor asks about several batches."""
        batches = self.batches_at(step)
        # 2 q points on each of several batches; the step's own estimate is the anchor's then
        return 2 * self.num_directions * batches if batches else self.num_queries

    def batches_at(self, step: int) -> int:
        """``anchor_batches`` in a step that makes an anchor, 0 in the others."""
        # an anchor is made every ``interval`` steps, over several batches
        return 0 if step % self.interval else self.anchor_batches

    def points(self, directions: list[Direction]) -> list[Point]:
        """+eps and -eps along each direction; where no anchor is made, the same from the anchor."""
        at_theta = [Point(direction, sign * self.eps) for direction in directions for sign in (1.0, -1.0)]
        if self.batches_at(directions[0].step):
            return at_theta
        # the same points once more, from the anchor: the same z, so that what the batch adds cancels
        return [*at_theta, *(replace(point, anchor=True) for point in at_theta)]

    def init(self) -> Memory:
        """The anchor's directions and coefficients: rows of seed, step, index, coefficient."""
        return {"terms": []}

    def measure(self, losses: Tensor, state: Memory | None = None) -> Measured:
        """The difference of two slopes, of which there is only one while there is no anchor."""
        # without an anchor the second half of the losses is of the same weights and would cancel the first
        anchored = state is not None and bool(state["terms"])
        return super().measure(losses if anchored else losses[: 2 * self.num_directions])

    def terms(self, terms: Terms, state: Memory) -> Terms:
        """The step's terms and the anchor's; a step that makes an anchor notes its own as the anchor's."""
        if self.batches_at(terms[0][0].step):
            # plain numbers: they go into the journal and the checkpoint
            state["terms"] = [[d.seed, d.step, d.index, coefficient] for d, coefficient in terms]
            return terms
        # + G, the anchor's estimate, as its own directions and coefficients
        return [*terms, *((Direction(seed, step, index), c) for seed, step, index, c in state["terms"])]

    def projected_grads(self, losses: Tensor) -> Tensor:
        """The slope at theta, minus the slope at the anchor where that was asked for: [Q]."""
        pairs = losses.view(-1, self.num_directions, 2)
        slopes = projected_grad(pairs[..., 0], pairs[..., 1], self.eps)
        # slope at theta minus slope at the anchor, along the same z and on the same batch
        return slopes[0] - slopes[1] if len(slopes) > 1 else slopes[0]

    def probe_losses(self, losses: Tensor) -> Tensor:
        """[L+, L-] of each direction at theta, [Q, 2]."""
        return losses[: 2 * self.num_directions].view(-1, 2)

    def loss(self, losses: Tensor) -> Tensor:
        """The mean over both sides at theta: the clean loss up to O(eps^2)."""
        return losses[: 2 * self.num_directions].mean()
