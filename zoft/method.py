"""A method: subspace, estimator, weighting and optimizer together; what does not go together, and what a step costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zoft.component import create
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.optimizers.base import Optimizer
from zoft.subspaces.base import Coordinates, Subspace
from zoft.weightings.base import Weighting
from zoft.weights import Weights


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
        if self.optimizer.needs_curvature and not self.estimator.measures_curvature:
            raise UserError(
                f"optimizer={self.optimizer.name()} needs the curvature along the directions, and "
                f"estimator={self.estimator.name()} does not measure it: use estimator=three_point"
            )

    @classmethod
    def of(
        cls,
        subspace: str | Subspace | None = None,
        estimator: str | Estimator | None = None,
        weighting: str | Weighting | None = None,
        optimizer: str | Optimizer | None = None,
    ) -> Method:
        """From names or components; None takes MeZO's."""
        return cls(
            create("subspace", subspace, "full"),
            create("estimator", estimator, "central"),
            create("weighting", weighting, "mean"),
            create("optimizer", optimizer, "sgd"),
        )

    # ---- cost --------------------------------------------------------------------------------------------------------

    def queries_at(self, step: int) -> int:
        """Forward passes of the objective that a step costs: points, a look at the inputs, trials of the step."""
        queries = self.estimator.queries_at(step) + len(self.optimizer.trials)
        if not self.estimator.asks_clean_loss:  # what a clean forward gives comes with the clean loss
            queries += self.subspace.looks_at_inputs(step) or bool(self.optimizer.trials)
        return queries

    def steps_within(self, queries: int) -> int:
        """How many steps a budget of queries pays for.

        Args:
            queries: forward passes of the objective.

        Raises:
            UserError: less than one step.
        """
        steps = spent = 0
        while (spent := spent + self.queries_at(steps)) <= queries:
            steps += 1
        if not steps:
            raise UserError(
                f"budget.queries={queries} is less than one step costs: estimator={self.estimator.name()} with "
                f"num_directions={self.estimator.num_directions} makes {self.queries_at(0)} queries a step"
            )
        return steps

    @property
    def foreseeable(self) -> bool:
        """Whether nothing but its points is queried in a step, and the next step's first point is known already."""
        return self.estimator.foreseeable and not self.optimizer.trials and not self.optimizer.shapes_directions

    def extra_elements(self, coordinates: Coordinates) -> int:
        """float32 numbers that the optimizer keeps from step to step, over all tensors."""
        names = coordinates.weights.tensors
        return sum(
            math.prod(shape)
            for name in names
            for shape in self.optimizer.state_shapes(coordinates.shape(name)).values()
        )

    def bind(self, weights: Weights) -> Coordinates:
        """The subspace for these weights, its directions hanging together as the estimator wants them."""
        coordinates = self.subspace.bind(weights, self.estimator.noise)
        estimator = self.estimator
        coordinates.still = estimator.still(list(weights.tensors))
        coordinates.arrange(
            estimator.across,
            estimator.num_directions,
            per_example=estimator.per_example,
            mixes=bool(self.optimizer.trials),
        )
        return coordinates
