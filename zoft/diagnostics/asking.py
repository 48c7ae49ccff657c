"""The method's own estimate of any directions of a step, as if the step had taken those."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from zoft.component import Memory
from zoft.diagnostics.bystander import Bystander
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction, step_seed
from zoft.optimizers._optional import line_search_of
from zoft.optimizers.base import Term
from zoft.optimizers.sgd import SGD
from zoft.step.query import StepQueries


@dataclass
class _Remembering:
    """Takes the place of a run's optimizer: says what parts remember, and applies nothing."""

    session: Bystander
    remembered: dict[str, Memory]

    def remember(self, **memory: Memory) -> None:
        """Nothing to do: what parts remember is copied already."""

    def memory(self) -> dict[str, Memory]:
        """What parts remembered before the step."""
        return copy.deepcopy(self.remembered)


@dataclass
class _InTheStep(StepQueries):
    """A run's queries, in a step that has begun: bases and masks are those in use."""

    def _begin(self, batch: Any, direction: Direction) -> tuple[Tensor | None, int, None]:
        del batch, direction
        return None, 0, None


@dataclass
class Asking:
    """Makes estimates of the directions it is given.

    Args:
        queries: the run's.
        session: answers.
        batch: of the step.
        estimator: as it is in this step.
        remembered: what estimator and weighting remembered before the step.
        slopes: the projected gradients of every group that was asked, by its directions.
    """

    queries: StepQueries
    session: Bystander
    batch: Any
    estimator: Estimator
    remembered: dict[str, Memory]
    slopes: dict[tuple[Direction, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = self.queries.method
        if line_search_of(method.optimizer):
            method = replace(method, optimizer=SGD())  # the estimate is wanted, not how far the step goes
        given = {one.name: getattr(self.queries, one.name) for one in fields(StepQueries)}
        examples = list(self.queries.examples(self.batch)) if isinstance(self.estimator, PerExample) else []
        beside = _Remembering(self.session, self.remembered)
        given |= {"method": method, "optimizer": beside, "agree": None, "examples": lambda _: examples}
        self._queries = _InTheStep(**given)

    def __call__(self, directions: Sequence[Direction]) -> list[Term] | None:
        """The estimate as directions and coefficients; None where a loss or a coefficient is not finite."""
        estimate = self._queries.estimate(self.batch, list(directions), self.of(len(directions)))
        if estimate.terms is None or estimate.projected_grads is None:
            return None
        self.slopes[tuple(directions)] = estimate.projected_grads
        return list(estimate.terms)

    def of(self, num_directions: int) -> Estimator:
        """The estimator with ``num_directions`` directions a step."""
        return replace(self.estimator, num_directions=num_directions)

    def sizes(self, num_probes: int) -> list[int]:
        """The q for which there are groups: powers of two up to half of the probes, and the run's own."""
        num_directions = self.estimator.num_directions
        if any(self.remembered.get(part) for part in ("estimator", "weighting")):
            return [num_directions]  # its state is of that number of directions
        powers = {1 << power for power in range(max(1, num_probes // 2).bit_length())}
        return sorted(
            q for q in powers | {num_directions} if q == num_directions or (2 * q <= num_probes and self._takes(q))
        )

    def _takes(self, num_directions: int) -> bool:
        try:
            self.of(num_directions)
        except UserError:
            return False
        return True

    def all_slopes(self, probes: Sequence[Direction]) -> Tensor:
        """The projected gradients of all probes, asked in groups of the run's own q; those that are finite."""
        q, slopes = self.estimator.num_directions, []
        for start in range(0, len(probes) - q + 1, q):
            group = probes[start : start + q]
            if self(group) is not None:
                slopes.append(self.slopes[tuple(group)])
        return torch.cat(slopes) if slopes else torch.empty(0)


def further(step_directions: Sequence[Direction], count: int, noise: str, *, given: bool) -> list[Direction]:
    """The step's directions and more of their kind, ``count`` in all.

    Args:
        step_directions: the step's, by their probes.
        count: how many are wanted.
        noise: where they come from, one of :data:`zoft.noise.source.SOURCES`.
        given: whether the steps have seeds of their own (``direction_seeds``).
    """
    first, more = step_directions[0], []
    for probe in range(len(step_directions), count):
        if given:
            more.append(Direction(step_seed(first.seed, probe), first.step, probe))
        elif noise == "torch_sequential":  # that source is seeded by the direction's seed alone
            more.append(Direction(first.seed + probe, first.step, probe))
        else:
            more.append(replace(first, index=probe))
    return [*step_directions, *more]
