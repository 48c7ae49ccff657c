"""A method: subspace, estimator, weighting and optimizer together; what does not go together, and what a step costs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoft.component import create
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor, NeedsBackward
from zoft.estimators.backprop import Backprop
from zoft.estimators.base import Estimator
from zoft.estimators.nodes import Nodes
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction
from zoft.optimizers._optional import line_search_of
from zoft.optimizers.base import Optimizer
from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.utils.lazy import torch
from zoft.weightings.base import Weighting
from zoft.weightings.per_prompt import PerPrompt
from zoft.weights.tensors import Weights

BACKWARD = 3
"""Queries that a backward pass counts, with the forward pass before it."""


def refuse_without_slopes(estimator: Estimator, clips: float | None, guard: str | None, place: str = "") -> None:
    """Refuse what clips or judges projected gradients, where an estimator has none or not those alone."""
    has_none = isinstance(estimator, Backprop | Nodes)
    is_clipped = clips and (has_none or estimator.backpropagates)
    if is_clipped or (guard not in (None, "none") and has_none):
        raise UserError(
            f"{place}{'max_grad_norm' if is_clipped else 'guard'} is about projected gradients, and steps of estimator="
            f"{estimator.name()} are not of those alone: leave it out, and lower the learning rate if they are too long"
        )


@dataclass
class Method:
    """A composition of parts.

    Args:
        subspace: which coordinates move.
        estimator: where the objective is queried.
        weighting: how slopes become coefficients.
        optimizer: what step is taken.

    Raises:
        UserError: parts that make no sense together.

    Example:
        >>> Method.of("low_rank", "one_sided", "mean", "momentum").queries_at(0)
        2
    """

    subspace: Subspace
    estimator: Estimator
    weighting: Weighting
    optimizer: Optimizer

    def __post_init__(self) -> None:
        for part in (self.subspace, self.estimator, self.weighting, self.optimizer):
            part.check_with(self)
        self.subspace.check_noise(self.estimator.noise)

    @classmethod
    def of(
        cls,
        subspace: str | Subspace | None = None,
        estimator: str | Estimator | None = None,
        weighting: str | Weighting | None = None,
        optimizer: str | Optimizer | None = None,
    ) -> Method:
        """A method of these parts, given by name or as components; None takes MeZO's part."""
        return cls(
            create("subspace", subspace, "full"),
            create("estimator", estimator, "central"),
            create("weighting", weighting, "mean"),
            create("optimizer", optimizer, "sgd"),
        )

    # ---- cost --------------------------------------------------------------------------------------------------------

    def queries_at(self, step: int) -> int:
        """Forward passes of the objective that a step costs: points, a look at the inputs, trials of the step."""
        queries = self.estimator.queries_at(step) + len(line_search_of(self.optimizer))
        # q points and trials, and beside them what the subspace observes: gradients take a forward and a backward pass
        queries += BACKWARD * (self.subspace.observes_at(step) == "gradient")
        # one clean forward serves the look at inputs and the trials; an estimator with a clean point has paid for it
        if not self.estimator.asks_clean_loss:
            queries += self.subspace.observes_at(step) == "inputs" or bool(line_search_of(self.optimizer))
        return queries

    def steps_within(self, queries: int) -> int:
        """How many steps a budget of queries pays for.

        Args:
            queries: forward passes of the objective.

        Raises:
            UserError: less than one step.
        """
        self.check_budget(queries)
        queries_at, observes_at = type(self.estimator).queries_at, type(self.subspace).observes_at
        if queries_at is Estimator.queries_at and observes_at is Subspace.observes_at:
            return queries // self.queries_at(0)  # every step costs the same
        steps = spent = 0  # counted step by step: those that observe, or make an anchor, cost more than others
        while (spent := spent + self.queries_at(steps)) <= queries:
            steps += 1
        return steps

    def check_budget(self, queries: int) -> None:
        """Refuse a budget of less than one step, without counting how many there are.

        Args:
            queries: forward passes of the objective.

        Raises:
            UserError: less than one step.
        """
        if queries < self.queries_at(0):
            raise UserError(
                f"budget.queries={queries} is less than one step costs: estimator={self.estimator.name()} with "
                f"num_directions={self.estimator.num_directions} makes {self.queries_at(0)} queries in the first one: "
                f"set budget.queries to {self.queries_at(0)} or more, or take fewer directions"
            )

    @property
    def asks_for_gradient(self) -> str:
        """The part that needs a derivative of the objective, as an argument (``estimator=backprop``); empty: none."""
        estimator = self.estimator
        if estimator.backpropagates or any(p.derivative for p in estimator.points(estimator.directions(0, 0))):
            return f"estimator={estimator.name()}"
        return f"subspace={self.subspace.name()}" if self.subspace.observes_at(0) == "gradient" else ""

    def check_scales(self) -> None:
        """Refuse what the scales of a quantised base cannot serve: vectors, read by kernels without a derivative.

        Raises:
            UserError: naming the part, and what to take instead.
        """
        if self.subspace.moves_outputs or self.subspace.observes_at(0) == "inputs":
            raise UserError(
                f"trainable=scales moves vectors, and subspace={self.subspace.name()} is about the inputs of matrices "
                "that are trained: use subspace=full"
            )
        if self.asks_for_gradient:
            raise UserError(
                f"trainable=scales asks for losses alone, and {self.asks_for_gradient} for a gradient, which the "
                "kernels of quantised layers do not have for their scales: use estimator=central in subspace=full"
            )

    def step_seeds(self, given: Sequence[int] | None) -> list[int] | None:
        """The seed of each step's directions, where a recorded run gives them; None where the run derives its own.

        Args:
            given: one a step.

        Raises:
            UserError: a subspace that keeps what a seed chose for several steps, with what to do instead.
        """
        if given is None:
            return None
        # a basis kept for several steps is drawn from the seed of their first: another seed would change it
        if self.subspace.keeps_choices or hasattr(self.subspace, "interval"):
            raise UserError(
                f"direction_seeds gives every step a seed of its own, and subspace={self.subspace.name()} keeps "
                "what the seed chose for several steps: use subspace=full"
            )
        return [int(seed) for seed in given]

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective that does not tell examples apart, where the weighting reads each one's loss.

        Args:
            objective: a :class:`zoft.lm.objectives.base.Objective`; None for the model's own loss.

        Raises:
            UserError: with what to do instead.
        """
        if isinstance(self.weighting, PerPrompt) and not getattr(objective, "tells_examples", False):
            name = "the model's own loss" if objective is None else f"objective={objective.name()} with these settings"
            raise UserError(
                f"weighting={self.weighting.name()} reads the loss of each example, and {name} is one number for all: "
                "use objective=reward, options or cross_entropy, or weighting=z_score"
            )

    def check_processes(self) -> None:
        """Refuse several processes where a part follows the rows of one process.

        Raises:
            UserError: with what to do instead.
        """
        if self.estimator.backpropagates:
            raise UserError(f"estimator={self.estimator.name()} works in one process: start the run without torchrun")
        if self.subspace.in_one_process:
            raise UserError(
                f"subspace={self.subspace.name()} with these settings follows the rows of one process: "
                "start the run without torchrun"
            )

    def extra_elements(self, coordinates: BoundSubspace) -> int:
        """Numbers that are kept from step to step: the optimizer's state, the subspace's bases, an anchor."""
        anchor = coordinates.weights.num_elements if isinstance(self.estimator, KeepsAnchor) else 0
        return anchor + coordinates.basis_elements() + self.state_elements(coordinates)

    def state_elements(self, coordinates: BoundSubspace) -> int:
        """float32 numbers of the optimizer's state, over all tensors."""
        # a tensor that no direction ever reaches has no state
        return sum(
            math.prod(shape)
            for name in coordinates.weights.tensors
            if coordinates.ever_moves(name)
            for shape in self.optimizer.state_shapes(coordinates.shape(name)).values()
        )

    def bind(self, weights: Weights) -> BoundSubspace:
        """The subspace for these weights, its directions hanging together as the estimator wants them."""
        coordinates = self.subspace.bind(weights, self.estimator.noise)
        estimator = self.estimator
        if isinstance(estimator, NeedsBackward):
            # before arrange(): what is backpropagated has no direction, and counts for no dimension
            coordinates.backprop_names = estimator.backprop_names(list(weights.tensors))
        coordinates.arrange(
            estimator.across,
            estimator.num_directions,
            per_example=isinstance(estimator, PerExample),
            mixes=bool(line_search_of(self.optimizer)),
        )
        if estimator.across == "orthogonal":  # known no sooner: the dimension is that of the bound subspace
            self._check_dimension(coordinates.dimension(Direction(0, 0)))
        self._check_memory(coordinates)
        return coordinates

    def _check_dimension(self, dimension: int) -> None:
        estimator = self.estimator
        if estimator.num_directions > dimension:
            raise UserError(
                f"estimator.across=orthogonal: there are no {estimator.num_directions} directions at right angles in a "
                f"space of {dimension} dimensions: lower estimator.num_directions, or take a larger subspace"
            )

    def _check_memory(self, coordinates: BoundSubspace) -> None:
        """Refuse an optimizer whose state cannot fit, before the first query rather than in the first update."""
        device = next(iter(coordinates.weights.tensors.values())).device
        # 4 bytes a number: state, bases and anchor are float32 whatever the weights' dtype is
        needed, available = 4 * self.extra_elements(coordinates), memory_of(device)
        if available is not None and needed > available:
            raise UserError(
                f"optimizer={self.optimizer.name()} keeps {needed / 2**30:.3g} GiB beside the weights, and this device "
                f"has {available / 2**30:.3g} GiB in all: use optimizer=sgd, or a subspace of few coordinates "
                "(subspace=two_sided)"
            )


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):
        return None
