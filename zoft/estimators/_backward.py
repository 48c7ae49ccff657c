"""The interface of estimators that take gradients from a backward pass, and the parts they cannot be combined with."""

from __future__ import annotations

from typing import Any, ClassVar

from zoft.errors import UserError
from zoft.estimators.base import Estimator

EVERY_LENGTH = (0, float("inf"))
"""Rows of any number of tokens."""


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
    """Refuse subspaces and optimizers that know directions only.

    Args:
        estimator: with a backward pass.
        method: a :class:`zoft.step.method.Method`.
    """
    subspace, optimizer = method.subspace, method.optimizer
    reason = f"estimator={estimator.name()} takes gradients from a backward pass, and "
    # subspaces have coordinates for directions; a backward pass gives numbers for every weight
    if subspace.name() != "full":
        raise UserError(f"{reason}subspace={subspace.name()} has no coordinates for them: use subspace=full")
    # a rule that shapes directions, or goes by their coefficients, has nothing of a plain gradient
    if optimizer.uses_directions:
        raise UserError(f"{reason}optimizer={optimizer.name()} {optimizer.uses_directions}: use optimizer=sgd or adam")
