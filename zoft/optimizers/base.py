"""What every optimizer promises: state for some coordinates, and a step from a gradient estimate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.component import Component
from zoft.noise.direction import Direction
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, torch

State = dict[str, "Tensor"]
"""A tensor's state, by name."""

Term = tuple[Direction, float]
"""A direction and its coefficient."""


@dataclass
class Estimate:
    """The estimate, and earlier steps, for a flat piece of one tensor's coordinates.

    Args:
        coordinates: the subspace, bound.
        name: the tensor.
        start: first coordinate of the piece.
        stop: one past the last.
        terms: directions and coefficients: the estimate is sum_j c_j z_j.
        curvatures: z_j^T H z_j for the same directions, where they were measured.
        records: the terms of earlier steps in this basis, the last one last; as many as the optimizer asks for.
        dense: a gradient from a backward pass, of the piece's length; it is added to the sum.
    """

    coordinates: BoundSubspace
    name: str
    start: int
    stop: int
    terms: list[Term]
    curvatures: list[float] | None = None
    records: Sequence[list[Term]] = ()
    dense: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all coordinates of the tensor."""
        return self.coordinates.shape(self.name)

    def gradient(self) -> Tensor:
        """The estimate itself: flat, float32, the caller's own."""
        # a tensor that is backpropagated alone; a copy, as the rule may overwrite it
        if not self.terms:
            assert self.dense is not None
            return self.dense.to(torch.float32, copy=True)
        # g = sum_j a_j z_j, and the part that came from a backward pass
        total = self.combination(self.terms)
        return total if self.dense is None else total.add_(self.dense)

    def combination(self, terms: list[Term]) -> Tensor:
        """sum_j c_j z_j for these terms."""
        return self.coordinates.combination(self.name, self.start, self.stop, terms)

    def squares(self, terms: list[Term]) -> Tensor:
        """sum_j c_j z_j^2 for these terms, element by element."""
        total: Tensor | None = None
        for direction, coefficient in terms:
            # sum_j a_j z_j^2
            square = self.coordinates.draw(direction, self.name, self.start, self.stop).square_().mul_(coefficient)
            total = square if total is None else total.add_(square)
        assert total is not None
        return total


@dataclass
class Optimizer(Component):
    """A rule from gradient estimate to step; learning rate and weight decay are applied for every rule alike.

    theta <- theta - learning_rate * (lift(update(g)) + weight_decay * theta)

    Args:
        learning_rate: step size; None takes the training arguments' ``learning_rate``.
        weight_decay: decoupled decay per unit of learning rate; None takes the training arguments' ``weight_decay``.
        scale_with_directions: multiply the learning rate by num_directions: a mean over q directions has 1 / q of the
            variance, and stands q times the step (MeZO, Lemma 2 and appendix A.2).
    """

    is_identity: ClassVar[bool] = False
    """Whether :meth:`update` hands the gradient back as it is, so that a step can be made while it is added."""

    linear_state: ClassVar[tuple[str, ...]] = ()
    """Which state tensors are linear in the estimates: they are carried over when the subspace changes its basis."""

    per_matrix: ClassVar[bool] = False
    """Whether a tensor's coordinates are updated as one matrix instead of piece by piece."""

    shapes_directions: ClassVar[bool] = False
    """Whether :meth:`shape` makes something of the directions before they are used."""

    uses_directions: ClassVar[str] = ""
    """What it does with directions, so that a gradient without them will not do (of a backward pass, of nodes)."""

    start_values: ClassVar[Mapping[str, float]] = {}
    """What a state tensor is filled with at the start, where that is not zero."""

    learning_rate: float | None = None
    weight_decay: float | None = None
    scale_with_directions: bool = False

    def check(self) -> None:
        """Refuse a negative learning rate or decay."""
        for field in ("learning_rate", "weight_decay"):
            value = getattr(self, field)
            self.require(value is None or 0 <= value < float("inf"), field, ">= 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse the other parts of a :class:`zoft.step.method.Method` that make no sense with this optimizer."""

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def history_length(self) -> int:
        """How many earlier steps' directions and coefficients it looks back at."""
        return 0

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name and shape of each float32 state tensor of a tensor whose coordinates have ``shape``."""
        del shape
        return {}

    # ---- a step ------------------------------------------------------------------------------------------------------

    def update_from(self, estimate: Estimate, state: State, step: int) -> Tensor:
        """The step's direction (before learning rate) for a piece of the coordinates.

        Args:
            estimate: what is known of the piece; with :attr:`per_matrix`, all coordinates of a tensor.
            state: the same piece of each state tensor, flat (with :attr:`per_matrix`, the tensors as they are);
                updated in place.
            step: number of this update of this tensor, from 1.

        Returns:
            float32, as many elements as the piece has.
        """
        # for most rules the estimate is all there is to know
        return self.update(estimate.gradient(), state, step)

    def update(self, gradient: Tensor, state: State, step: int) -> Tensor:
        """As :meth:`update_from`, for rules that need the estimate alone: flat, and it may be overwritten."""
        raise NotImplementedError

    # ---- directions shaped by the state ------------------------------------------------------------------------------

    def shape_context(self, states: Mapping[str, State], step: int) -> Any:
        """Numbers over all tensors that :meth:`shape` needs, made once before the queries of a step.

        Args:
            states: the state of every tensor that moves in this step, by name.
            step: number of the step, from 0.
        """
        del states, step
        return None

    def shape(self, z: Tensor, state: State, context: Any) -> Tensor:
        """The direction that is used in place of a random one, element by element.

        Args:
            z: elements of the direction, of mean 0 and variance 1; may be overwritten and handed back.
            state: the same elements of each state tensor; read only.
            context: what :meth:`shape_context` gave.
        """
        del state, context
        # no state, no shape: z as it was drawn
        return z


def norm_of(states: Mapping[str, State], key: str) -> float:
    """Length of one state tensor over all tensors, summed in float64."""
    # ||s||^2 over all tensors, summed in float64: the order of the tensors leaves no trace
    squares = (torch.linalg.vector_norm(state[key], dtype=torch.float64).item() ** 2 for state in states.values())
    return math.sqrt(math.fsum(squares))


def num_elements_of(states: Mapping[str, State], key: str) -> int:
    """Elements of one state tensor over all tensors."""
    return sum(state[key].numel() for state in states.values())
