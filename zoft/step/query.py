"""The queries of one step: what is asked of the model, in which order, and the estimate that the answers give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoft.engines.base import Backward
from zoft.estimators.base import Estimator, Measured, Point
from zoft.estimators.nodes import Nodes
from zoft.noise.direction import Direction
from zoft.step.method import BACKWARD, Method
from zoft.step.nodes import NodeQueries
from zoft.step.update import ZOOptimizer


def _as_they_are(losses: Tensor) -> Tensor:
    return losses


@dataclass
class Asked:
    """What a step's queries found.

    Args:
        losses: the objective at the points, float32 [P] (or [P, B] where every example has directions of its own).
        measured: what they say; None where a loss is not finite.
        loss: the training loss to report.
        num_queries: forward passes that were made.
        usable: whether the stepper has an estimate; without one the step must move nothing.
    """

    losses: Tensor
    measured: Measured | None
    loss: float
    num_queries: int
    usable: bool


@dataclass
class Queries:
    """Asks a session what a method wants to know, and hands the estimate to a stepper.

    Args:
        method: the composition.
        stepper: holds the session, takes the estimate, and keeps what parts remember.
        examples: a batch as batches of one example each; for estimators with directions for each example.
        select: (batch, (shortest, longest)) -> the rows of so many tokens, or None if there are none.
        batches: (how many) -> batches of the training data, for estimators that ask about more than the step's own.
        average: losses of this process -> of all processes.
        agree: what the subspace has seen in the first process, for all of them.
        gather: something of this process -> that of all of them, by rank; None where there is one.
        places: (batch, how many examples) -> for every process, the places of its examples in the batch of all.
        on_observation: is told (step, what the subspace has seen) where it has looked at the model before the queries.
        rank: number of this process.
        nodes: asks for node gradients, where the estimator makes its estimate of them.
    """

    method: Method
    stepper: ZOOptimizer
    examples: Callable[[Any], Sequence[Any]] = field(default=lambda batch: [batch])
    select: Callable[[Any, tuple[int, float]], Any] = field(default=lambda batch, lengths: batch)
    batches: Callable[[int], Iterable[Any]] = field(default=lambda count: [])
    average: Callable[[Tensor], Tensor] = _as_they_are
    agree: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    gather: Callable[[Any], list[Any]] | None = None
    places: Callable[[Any, int], list[list[int]]] = field(default=lambda batch, count: [list(range(count))])
    on_observation: Callable[[int, dict[str, Any]], None] | None = None
    rank: int = 0
    nodes: NodeQueries | None = None

    def __post_init__(self) -> None:
        scalars = self.stepper.scalars
        scalars.setdefault("estimator", self.method.estimator.init())
        scalars.setdefault("weighting", self.method.weighting.init())
        self.session = self.stepper.session
        self._scored = 0  # queries that a backward pass before the step's own has cost

    def __call__(
        self,
        batch: Any,
        directions: list[Direction],
        estimator: Estimator | None = None,
        *,
        lr: float = 0.0,
    ) -> Asked:
        """Query, and leave the estimate with the stepper.

        Args:
            batch: handed to the objective as it is.
            directions: the step's.
            estimator: the method's own as it is at this place of the run; as it was made if left out.
            lr: the learning rate of the step, for methods that try the step before they take it.
        """
        estimator, scalars = estimator or self.method.estimator, self.stepper.scalars
        self.stepper.pending = self.stepper.backward = self.stepper.curvatures = self.stepper.factors = None
        before = copy.deepcopy({part: scalars[part] for part in ("estimator", "weighting")})
        usable = False
        try:
            clean = self._begin(batch, directions[0])
            if estimator.makes_factors:
                asked = self._of_nodes(batch, directions[0], estimator)
            elif estimator.backpropagates:
                asked = self._with_gradient(batch, directions, estimator)
            else:
                asked = self._all(batch, directions, estimator, clean, lr=lr)
            usable = asked.usable
        finally:
            if not usable:  # a step that comes to nothing is not remembered either
                scalars.update(before)
                self.stepper.pending = self.stepper.backward = self.stepper.curvatures = self.stepper.factors = None
        if estimator.batches_at(directions[0].step) and usable:
            self.session.keep_anchor()
        return replace(asked, num_queries=asked.num_queries + self._scored)

    def _all(
        self,
        batch: Any,
        directions: list[Direction],
        estimator: Estimator,
        clean: Tensor | None,
        *,
        lr: float,
    ) -> Asked:
        """The whole estimate from queries."""
        directions, losses, queries = self._losses(batch, directions, estimator, clean)
        if not bool(torch.isfinite(losses).all()):
            return Asked(losses, None, float(estimator.loss(losses)), queries, usable=False)
        measured = estimator.measure(losses, self.stepper.scalars["estimator"])
        usable = self._estimate(estimator, directions, measured)
        if usable and self.method.optimizer.line_search:
            usable, more = self._try_the_step(batch, float(measured.loss) if estimator.asks_clean_loss else None, lr)
            queries += more
        return Asked(losses, measured, float(measured.loss), queries, usable)

    def _of_nodes(self, batch: Any, direction: Direction, estimator: Estimator) -> Asked:
        """The estimate as factors: gradients of layers' outputs, and the inputs that they belong to."""
        assert self.nodes is not None
        assert isinstance(estimator, Nodes)
        found = self.nodes(batch, direction, estimator)
        if found.usable:
            self.stepper.pending, self.stepper.factors, self.stepper.loss = [], found.factors, found.loss
        return Asked(torch.tensor([found.loss]), None, found.loss, found.num_queries, found.usable)

    def _begin(self, batch: Any, direction: Direction) -> Tensor | None:
        """Settle what the directions of the step depend on; the clean loss, where that took a forward."""
        coordinates, clean, self._scored = self.session.coordinates, None, 0
        coordinates.begin(direction)
        scores, looks = coordinates.gradients_wanted(direction), coordinates.inputs_wanted(direction)
        if scores:
            _, run = self.session.graph(batch)
            self._score(run)
            self._scored = BACKWARD
        if looks:
            clean = self.average(self.session.observe(batch, direction).view(1))[0]
        if looks and self.gather is not None:
            coordinates.join(direction, self.gather)
        if (scores or looks) and self.agree is not None:
            coordinates.load_state_dict(self.agree(coordinates.state_dict()))
        if (scores or looks) and self.on_observation is not None:
            self.on_observation(direction.step, coordinates.state_dict())
        self.stepper.begin(direction)
        return clean

    def _score(self, run: Backward) -> None:
        """The gradients of the step's batch, of all processes' rows where there are several."""
        coordinates = self.session.coordinates
        if self.gather is None:
            run(coordinates.score)
        else:  # a process may lack some of them (an expert that none of its tokens reaches)
            mine: dict[str, Tensor] = {}
            run(lambda name, gradient: mine.update({name: gradient.detach().float().cpu()}))
            for name, tensor in self.session.weights.tensors.items():
                flat = mine.pop(name).view(-1) if name in mine else torch.zeros(tensor.numel())
                coordinates.score(name, self.average(flat).view(tensor.shape).to(tensor.device))
        coordinates.scored()

    # ---- losses ------------------------------------------------------------------------------------------------------

    def _losses(
        self, batch: Any, directions: list[Direction], estimator: Estimator, clean: Tensor | None
    ) -> tuple[list[Direction], Tensor, int]:
        """(directions, losses in the points' order, queries made)."""
        points = estimator.points(directions)
        queries = estimator.queries_at(directions[0].step) + (clean is not None and not estimator.asks_clean_loss)
        if estimator.per_example:
            return *self._per_example(batch, directions, points), queries
        wide = estimator.batches_at(directions[0].step)
        if wide:
            over = [self._at(one, points) for one in self.batches(wide)]
            return directions, torch.stack(over).mean(0), queries - len(points) * (wide - len(over))
        return directions, self._at(batch, points, clean), queries

    def _per_example(
        self, batch: Any, directions: list[Direction], points: list[Point]
    ) -> tuple[list[Direction], Tensor]:
        """(every example's own directions, losses [P, B]), over the examples of all processes in their places."""
        examples = list(self.examples(batch))
        places = self.places(batch, len(examples))
        losses = self.session.losses_per_example(examples, points, places[self.rank])
        if self.gather is not None:
            losses = torch.cat(self.gather(losses), dim=1)
        order = torch.tensor([place for of_rank in places for place in of_rank]).argsort()
        numbers = range(len(order))
        return [replace(direction, example=number) for direction in directions for number in numbers], losses[:, order]

    def _at(self, batch: Any, points: list[Point], clean: Tensor | None = None) -> Tensor:
        """The objective at some points, those at the anchor among them; a clean loss that is known is not asked for."""
        here = [p for p in points if not p.anchor and (clean is None or p.direction is not None)]
        found = self.average(self.session.losses(batch, here)) if here else torch.empty(0)
        there = [p for p in points if p.anchor]
        if there:
            with self.session.at_anchor():
                at_anchor = iter(self.average(self.session.losses(batch, there)).unbind())
        answers = iter(found.unbind())
        values = []
        for point in points:
            if point.anchor:
                values.append(next(at_anchor))
            elif point.direction is None and clean is not None:
                values.append(clean)
            else:
                values.append(next(answers))
        return torch.stack(values)

    # ---- the estimate ------------------------------------------------------------------------------------------------

    def _estimate(self, estimator: Estimator, directions: list[Direction], measured: Measured) -> bool:
        """Hand (direction, coefficient) pairs to the stepper; whether they are finite."""
        gram = lambda: self.session.coordinates.gram(directions)  # noqa: E731
        coefficients = self.method.weighting.coefficients(measured, gram, self.stepper.scalars["weighting"])
        if not bool(torch.isfinite(coefficients).all()):
            return False
        terms = list(zip(directions, coefficients.tolist(), strict=True))
        self.stepper.pending = estimator.terms(terms, self.stepper.scalars["estimator"])
        self.stepper.curvatures = None if measured.curvatures is None else measured.curvatures.tolist()
        return True

    def _with_gradient(self, batch: Any, directions: list[Direction], estimator: Estimator) -> Asked:
        """Part of the gradient from a backward pass, the rest from queries."""
        terms: list[tuple[Direction, float]] = []
        queries, losses, measured = estimator.queries_at(directions[0].step), torch.empty(0), None
        far = self.select(batch, estimator.queried_lengths)
        if estimator.points(directions) and far is not None:
            losses = self._at(far, estimator.points(directions))
            if not bool(torch.isfinite(losses).all()):
                return Asked(losses, None, float(estimator.loss(losses)), queries, usable=False)
            measured = estimator.measure(losses, self.stepper.scalars["estimator"])
            if not self._estimate(estimator, directions, measured):
                return Asked(losses, measured, float(measured.loss), queries, usable=False)
            terms, self.stepper.pending = self.stepper.pending or [], None
        near = self.select(batch, estimator.backpropagated_lengths)
        if near is None:
            assert measured is not None
            self.stepper.pending = terms
            return Asked(losses, measured, float(measured.loss), queries, usable=True)
        names = frozenset(self.session.coordinates.still) or None
        loss, run = self.session.graph(near, names)
        value = float(self.average(loss.view(1))[0])
        if not math.isfinite(value):
            return Asked(loss.view(1), measured, value, queries, usable=False)
        share = estimator.share_of_backward(measured is not None)
        zeroth = 1.0 if names else 1.0 - share
        self.stepper.pending = [(direction, zeroth * coefficient) for direction, coefficient in terms]
        self.stepper.backward = lambda take: run(lambda name, gradient: take(name, gradient.mul(share)))
        return Asked(torch.cat((losses, loss.view(1))), measured, value, queries, usable=True)

    # ---- trying the step ---------------------------------------------------------------------------------------------

    def _try_the_step(self, batch: Any, clean: float | None, lr: float) -> tuple[bool, int]:
        """Ask the objective where the step would lead, and let the optimizer choose."""
        terms, rule = self.stepper.pending, self.method.optimizer
        assert terms is not None
        step = Direction(terms[0][0].seed, terms[0][0].step, -1, mix=tuple(terms))
        points = [Point(step, -lr * multiple) for multiple in rule.line_search]
        if clean is None:
            points.insert(0, Point())
        losses = self._at(batch, points).tolist()
        at_clean = clean if clean is not None else losses.pop(0)
        if not all(map(math.isfinite, losses)):
            self.stepper.pending = None
            return False, len(points)
        chosen = rule.choose({0.0: at_clean, **dict(zip(rule.line_search, losses, strict=True))})
        self.stepper.pending = [(direction, chosen * coefficient) for direction, coefficient in terms]
        return True, len(points)
