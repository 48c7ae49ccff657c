"""Backpropagation, the first-order reference: the same harness, data and budget, and the memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError, refuse_ignored
from zoft.estimators._optional import NeedsBackward, check_parts
from zoft.estimators.base import Estimator, Point
from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


@dataclass
class Backprop(NeedsBackward, Estimator):
    """The gradient itself from one backward pass: no directions, 3 queries a step (a backward is two forwards).

    With ``optimizer=adam`` it is AdamW, with ``optimizer=sgd`` SGD. Each tensor's step is written as soon as its
    gradient is there, and the gradient is freed: no more than a few of them exist at a time. The model is in evaluation
    mode as in every query (no dropout), and one process alone trains.

    Args:
        num_directions: 1; nothing is drawn.

    References: LOMO (Lv et al. 2023), Algorithm 1, for the step written inside the backward pass.
    """

    def check(self) -> None:
        """Refuse more than one direction: none is drawn."""
        super().check()
        self.require(self.num_directions == 1, "num_directions", "1 (nothing is queried along directions)")

    def check_with(self, method: Any) -> None:
        """Refuse a subspace, and what weighs or shapes directions."""
        check_parts(self, method)
        if method.subspace.law != "gaussian":
            refuse_ignored(
                f"subspace.law={method.subspace.law} does nothing: estimator={self.name()} draws no directions: leave "
                "it out"
            )
        # weightings make coefficients of slopes, of which there are none
        if method.weighting.name() != "mean":
            raise UserError(
                f"estimator={self.name()} has no directions for weighting={method.weighting.name()} to weigh: use "
                "weighting=mean"
            )

    @property
    def num_queries(self) -> int:
        """A forward, and a backward that is counted as two more."""
        return 3

    def points(self, directions: list[Direction]) -> list[Point]:
        """Empty: nothing is queried."""
        del directions
        # no point is queried: the objective is asked once, with its graph
        return []

    def projected_grads(self, losses: Tensor) -> Tensor:
        """Empty, [0]: there are no directions."""
        return losses.new_empty(0)

    def loss(self, losses: Tensor) -> Tensor:
        """The mean of what is given; the loss of the forward itself stands in the step's estimate."""
        return losses.new_zeros(()) if not len(losses) else losses.mean()
