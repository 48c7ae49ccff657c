"""The method's own estimate of any directions of a step, as if the step had taken those."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoft.diagnostics.bystander import Bystander
from zoft.errors import UserError
from zoft.noise.direction import Direction, step_seed
from zoft.optimizers.base import Term
from zoft.optimizers.sgd import SGD
from zoft.step.query import Asked, Queries

if TYPE_CHECKING:
    from zoft.estimators.base import Estimator


@dataclass
class _Held:
    """What stands where a run has its stepper: takes an estimate and keeps what parts remember."""

    session: Bystander
    scalars: dict[str, Any]
    pending: list[Term] | None = None
    backward: Any = None
    curvatures: list[float] | None = None


@dataclass
class _InTheStep(Queries):
    """A run's queries, in a step that has begun: bases and masks are those in use."""

    def _begin(self, batch: Any, direction: Direction) -> Tensor | None:
        del batch, direction
        return None


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

    queries: Queries
    session: Bystander
    batch: Any
    estimator: Estimator
    remembered: dict[str, Any]
    slopes: dict[tuple[Direction, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method = self.queries.method
        if method.optimizer.line_search:
            method = replace(method, optimizer=SGD())  # the estimate is wanted, not how far the step goes
        given = {one.name: getattr(self.queries, one.name) for one in fields(Queries)}
        examples = list(self.queries.examples(self.batch)) if self.estimator.per_example else []
        self._held = _Held(self.session, {})
        given |= {"method": method, "stepper": self._held, "saw": None, "agree": None, "examples": lambda _: examples}
        self._held.scalars = copy.deepcopy(self.remembered)
        self._ask = _InTheStep(**given)

    def __call__(self, directions: Sequence[Direction]) -> list[Term] | None:
        """The estimate as directions and coefficients; None where a loss or a coefficient is not finite."""
        self._held.scalars = copy.deepcopy(self.remembered)
        asked: Asked = self._ask(self.batch, list(directions), self.of(len(directions)))
        if not asked.usable or asked.measured is None:
            return None
        self.slopes[tuple(directions)] = asked.measured.projected_grads
        return self._held.pending

    def of(self, num_directions: int) -> Estimator:
        """The estimator with ``num_directions`` directions a step."""
        return replace(self.estimator, num_directions=num_directions)

    def sizes(self, num_probes: int) -> list[int]:
        """The q for which there are groups: powers of two up to half of the probes, and the run's own."""
        own = self.estimator.num_directions
        if any(self.remembered.get(part) for part in ("estimator", "weighting")):
            return [own]  # its state is of that number of directions
        powers = {1 << power for power in range(max(1, num_probes // 2).bit_length())}
        return sorted(q for q in powers | {own} if q == own or (2 * q <= num_probes and self._takes(q)))

    def _takes(self, num_directions: int) -> bool:
        try:
            self.of(num_directions)
        except UserError:
            return False
        return True

    def all_slopes(self, probes: Sequence[Direction]) -> Tensor:
        """The projected gradients of all probes, asked in groups of the run's own q; those that are finite."""
        q, found = self.estimator.num_directions, []
        for start in range(0, len(probes) - q + 1, q):
            group = probes[start : start + q]
            if self(group) is not None:
                found.append(self.slopes[tuple(group)])
        return torch.cat(found) if found else torch.empty(0)


def further(own: Sequence[Direction], count: int, noise: str, *, given: bool) -> list[Direction]:
    """The step's directions and more of their kind, ``count`` in all.

    Args:
        own: the step's, by their probes.
        count: how many are wanted.
        noise: where they come from, one of :data:`zoft.noise.source.SOURCES`.
        given: whether the steps have seeds of their own (``direction_seeds``).
    """
    first, more = own[0], []
    for probe in range(len(own), count):
        if given:
            more.append(Direction(step_seed(first.seed, probe), first.step, probe))
        elif noise == "torch_sequential":  # that source is seeded by the direction's seed alone
            more.append(Direction(first.seed + probe, first.step, probe))
        else:
            more.append(replace(first, index=probe))
    return [*own, *more]
