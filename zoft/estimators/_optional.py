"""Optional interfaces of estimators: query at an anchor, take gradients from a backward pass, measure curvature.

Beside two of them stands the check of the parts that they cannot do without, or do not go with.
"""

from __future__ import annotations

from typing import Any, ClassVar

from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.utils.lazy import Tensor

EVERY_LENGTH = (0, float("inf"))
"""Rows of any number of tokens."""


class KeepsAnchor:
    """An estimator that asks at a copy of the trained weights, made anew now and then."""

    def batches_at(self, step: int) -> int:
        """Batches over which the losses are averaged in a step that makes an anchor; 0 in the others."""
        raise NotImplementedError


class NeedsBackward:
    """An estimator whose estimate comes from a backward pass, wholly or in part."""

    backpropagates: ClassVar[bool] = True

    @property
    def queried_lengths(self) -> tuple[int, float]:
        """(shortest, longest) rows of a batch, in tokens, that are queried where others are backpropagated."""
        return EVERY_LENGTH

    @property
    def backpropagated_lengths(self) -> tuple[int, float]:
        """(shortest, longest) rows of a batch, in tokens, that go through a backward pass."""
        return EVERY_LENGTH

    def share_of_backward(self, queried: bool) -> float:
        """The weight of the backward pass's gradient in the estimate; queries have the rest.

        Args:
            queried: whether there is an estimate from queries for the same tensors.
        """
        del queried
        return 1.0

    def backprop_names(self, names: list[str]) -> frozenset[str]:
        """Which of the trained tensors are trained by the backward pass instead of queries; empty: all of them by both.

        Args:
            names: of all trained tensors, in the model's order.
        """
        del names
        return frozenset()


def check_parts(estimator: Estimator, method: Any) -> None:
    """Refuse subspaces and optimizers that know directions only."""
    subspace, optimizer = method.subspace, method.optimizer
    reason = f"estimator={estimator.name()} takes gradients from a backward pass, and "
    # subspaces have coordinates for directions; a backward pass gives numbers for every weight
    if subspace.name() != "full":
        raise UserError(f"{reason}subspace={subspace.name()} has no coordinates for them: use subspace=full")
    # a rule that shapes directions, or goes by their coefficients, has nothing of a plain gradient
    if optimizer.uses_directions:
        raise UserError(f"{reason}optimizer={optimizer.name()} {optimizer.uses_directions}: use optimizer=sgd or adam")


class MeasuresCurvature:
    """An estimator whose losses give second differences besides slopes (:attr:`zoft.estimators.base.Measured`)."""

    def curvatures(self, losses: Tensor) -> Tensor:
        """z^T H z along each direction, float32 [Q].

        Args:
            losses: the objective at the estimator's points, float32 [P].
        """
        raise NotImplementedError


def require_curvature(part: str, method: Any) -> None:
    """Refuse an estimator that measures none.

    Args:
        part: what needs it, as ``group=name``.
        method: a :class:`zoft.step.method.Method`.
    """
    if not isinstance(method.estimator, MeasuresCurvature):
        raise UserError(
            f"{part} needs the curvature along the directions, and estimator={method.estimator.name()} does not "
            "measure it: use estimator=three_point"
        )
