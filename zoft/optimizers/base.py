"""What every optimizer promises: state for some coordinates, and a step from a gradient estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from zoft.component import Component

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Optimizer(Component):
    """A rule from gradient estimate to step; learning rate and weight decay are applied for every rule alike.

    theta <- theta - learning_rate * (lift(update(g)) + weight_decay * theta)

    Args:
        learning_rate: step size; None takes the training arguments' ``learning_rate``.
        weight_decay: decoupled decay per unit of learning rate; None takes the training arguments' ``weight_decay``.
    """

    hands_back: ClassVar[bool] = False
    """Whether :meth:`update` hands the gradient back as it is, so that a step can be made while it is added."""

    carried: ClassVar[tuple[str, ...]] = ()
    """Which state tensors are linear in the estimates: they are carried over when the subspace changes its basis."""

    learning_rate: float | None = None
    weight_decay: float | None = None

    def check(self) -> None:
        """Refuse a negative learning rate or decay."""
        for field in ("learning_rate", "weight_decay"):
            value = getattr(self, field)
            self.require(value is None or 0 <= value < float("inf"), field, ">= 0 and finite")

    def state_names(self) -> tuple[str, ...]:
        """Names of the float32 state tensors, each of the coordinates' shape, all zero at the start."""
        return ()

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The step's direction (before learning rate) for a flat piece of the coordinates.

        Args:
            gradient: the estimate for this piece, flat; may be overwritten.
            state: the same piece of each state tensor; updated in place.
            step: number of this update of this tensor, from 1.
        """
        raise NotImplementedError
