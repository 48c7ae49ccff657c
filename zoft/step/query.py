"""The queries of one step: which losses are computed, in which order, and the estimate made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zoft.engines._backward import Backward, loss_with_graph
from zoft.engines._optional import LeavesTrace
from zoft.estimators._optional import KeepsAnchor, NeedsBackward
from zoft.estimators.base import Estimator, Point
from zoft.estimators.nodes import Nodes
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction
from zoft.optimizers._optional import TriesSteps
from zoft.step.estimate import StepEstimate
from zoft.step.method import BACKWARD, Method
from zoft.step.nodes import NodeQueries
from zoft.step.shares import Shares
from zoft.step.update import ZOOptimizer
from zoft.subspaces._observes import ObservesGradients, ObservesInputs
from zoft.subspaces.base import SubspaceState
from zoft.weightings.per_prompt import PerPrompt


def _as_they_are(losses: Tensor, batch: Any) -> Tensor:
    del batch
    return losses


@dataclass
class StepQueries:
    """Queries a session for the losses that a method needs in a step, and makes a :class:`StepEstimate` of them.

    Args:
        method: the composition.
        optimizer: holds the session, and what parts remember from step to step; hears when a step begins.
        examples: a batch as batches of one example each; for estimators with directions for each example.
        each: a batch whose loss is that of each of its examples, [B]; for weightings that ask for it.
        select: (batch, (shortest, longest)) -> the rows of that many tokens, or None if there are none.
        batches: (batch, how many, step) -> batches of the training data, for estimators that ask about more than the
            step's own.
        average: (losses of this process, batch) -> those of all processes.
        agree: what the subspace has seen in the first process, for all of them.
        gather: something of this process -> that of all of them, by rank; None where there is one.
        places: (batch, how many examples) -> for every process, the places of its examples in the batch of all.
        rank: number of this process.
        nodes: asks for node gradients, where the estimator makes its estimate of them.
        shares: which of a step's points this process asks, where several have its rows.
    """

    method: Method
    optimizer: ZOOptimizer
    examples: Callable[[Any], Sequence[Any]] = field(default=lambda batch: [batch])
    each: Callable[[Any], Any] = field(default=lambda batch: batch)
    select: Callable[[Any, tuple[int, float]], Any] = field(default=lambda batch, lengths: batch)
    batches: Callable[[Any, int, int], Iterable[Any]] = field(default=lambda batch, count, step: [])
    average: Callable[[Tensor, Any], Tensor] = _as_they_are
    agree: Callable[[SubspaceState], SubspaceState] | None = None
    gather: Callable[[Any], list[Any]] | None = None
    places: Callable[[Any, int], list[list[int]]] = field(default=lambda batch, count: [list(range(count))])
    rank: int = 0
    nodes: NodeQueries | None = None
    shares: Shares = field(default_factory=Shares)

    def __post_init__(self) -> None:
        self.session = self.optimizer.session
        self.optimizer.remember(estimator=self.method.estimator.init(), weighting=self.method.weighting.init())

    def estimate(
        self, batch: Any, directions: list[Direction], estimator: Estimator | None = None, *, lr: float = 0.0
    ) -> StepEstimate:
        """Query the objective; neither the weights nor what parts remember have changed afterwards.

        Args:
            batch: handed to the objective as it is.
            directions: the step's.
            estimator: the method's own as it is at this place of the run; as it was made if left out.
            lr: the learning rate of the step, for methods that try the step before they take it.
        """
        estimator = estimator or self.method.estimator
        # a copy: what parts remember changes only once the step is applied
        memory = self.optimizer.memory()
        if isinstance(self.session, LeavesTrace):
            self.session.take_path()  # begins a new one: what was walked outside of steps is no part of this one
        clean, scored, observations = self._begin(batch, directions[0])
        blank = StepEstimate(
            directions, eps=estimator.radius, num_queries=scored, observations=observations, memory=memory
        )
        if isinstance(estimator, Nodes):
            estimate = self._of_nodes(blank, batch, estimator)
        elif isinstance(estimator, NeedsBackward):
            estimate = self._with_gradient(blank, batch, estimator)
        else:
            estimate = self._all(blank, batch, estimator, clean, lr)
        if isinstance(self.session, LeavesTrace):
            # where queries leave errors in the weights, a replay can walk the same points, and nothing but those
            estimate = replace(estimate, leaves_no_trace=self.session.take_path() == estimator.points(directions))
        if not estimate.is_usable:  # a step that comes to nothing is not remembered either, and has no slope
            return replace(estimate, memory=self.optimizer.memory(), projected_grads=torch.tensor([torch.nan]))
        if isinstance(estimator, KeepsAnchor):
            estimate = replace(estimate, keeps_anchor=estimator.batches_at(estimate.step) > 0)
        return estimate

    def _all(
        self, blank: StepEstimate, batch: Any, estimator: Estimator, clean: Tensor | None, lr: float
    ) -> StepEstimate:
        """The estimate of a method that has no backward pass."""
        directions, losses, queries = self._losses(batch, list(blank.directions), estimator, clean)
        examples = losses if isinstance(self.method.weighting, PerPrompt) else None  # [P, B]
        losses = losses if examples is None else losses.mean(1)  # every example counts alike
        estimate = self._measured(blank, directions, losses, estimator, examples)
        estimate = replace(estimate, num_queries=blank.num_queries + queries)
        if estimate.is_usable and isinstance(self.method.optimizer, TriesSteps):
            return self._try_the_step(estimate, batch, estimate.loss if estimator.asks_clean_loss else None, lr)
        return estimate

    def _of_nodes(self, blank: StepEstimate, batch: Any, estimator: Estimator) -> StepEstimate:
        """The estimate as factors: gradients of layers' outputs, and the inputs that they belong to."""
        assert self.nodes is not None
        assert isinstance(estimator, Nodes)
        nodes = self.nodes(batch, blank.directions[0], estimator)
        estimate = replace(blank, losses=torch.tensor([nodes.loss]), loss=nodes.loss)
        estimate = replace(estimate, num_queries=blank.num_queries + nodes.num_queries)
        # a step may have probes that were not planned: after one whose own were not finite, or without labels
        learnt = self.session.coordinates.state_dict() if nodes.num_queries > estimator.num_queries else None
        return replace(estimate, terms=[], factors=nodes.factors, observations=learnt) if nodes.usable else estimate

    def _begin(self, batch: Any, direction: Direction) -> tuple[Tensor | None, int, SubspaceState | None]:
        """Settle what the directions of the step depend on, before the first of them is drawn.

        Returns:
            The clean loss, where that took a forward; the queries of a backward pass that was made for it; and the
            state of the subspace, where it has observed something.
        """
        coordinates, clean, queries, observations = self.session.coordinates, None, 0, None
        coordinates.begin(direction)
        if isinstance(coordinates, ObservesGradients) and coordinates.gradients_wanted(direction):
            _, run = loss_with_graph(self.session, batch)
            self._score(coordinates, run, batch)
            queries, observations = BACKWARD, coordinates.state_dict()
        if isinstance(coordinates, ObservesInputs) and coordinates.inputs_wanted(direction):
            clean = self.average(self.session.observe(batch, direction).view(1), batch)[0]
            if self.gather is not None:
                coordinates.join(direction, self.gather)
            observations = coordinates.state_dict()
        # The last bits of a basis may differ from process to process, and so would the directions in it.
        if observations is not None and self.agree is not None:
            coordinates.load_state_dict(self.agree(observations))
            observations = coordinates.state_dict()
        # after the subspace: the rule's state is carried over to the basis that has just begun
        self.optimizer.begin(direction)
        return clean, queries, observations

    def _score(self, coordinates: ObservesGradients, run: Backward, batch: Any) -> None:
        """The gradients of the step's batch, of all processes' rows where there are several."""
        if self.gather is None:
            run(coordinates.score)
        else:  # a process may lack some of them (an expert that none of its tokens reaches)
            gradients: dict[str, Tensor] = {}
            run(lambda name, gradient: gradients.update({name: gradient.detach().float().cpu()}))
            for name, tensor in self.session.weights.tensors.items():
                flat = gradients.pop(name).view(-1) if name in gradients else torch.zeros(tensor.numel())
                coordinates.score(name, self.average(flat, batch).view(tensor.shape).to(tensor.device))
        coordinates.scored()

    # ---- losses ------------------------------------------------------------------------------------------------------

    def _losses(
        self, batch: Any, directions: list[Direction], estimator: Estimator, clean: Tensor | None
    ) -> tuple[list[Direction], Tensor, int]:
        """(directions, losses in the points' order, queries made)."""
        points = estimator.points(directions)
        queries = estimator.queries_at(directions[0].step) + (clean is not None and not estimator.asks_clean_loss)
        if isinstance(estimator, PerExample):
            return *self._per_example(batch, directions, points), queries
        if isinstance(self.method.weighting, PerPrompt):
            return directions, self._of_each(batch, points, clean), queries
        step = directions[0].step
        if isinstance(estimator, KeepsAnchor) and (wide := estimator.batches_at(step)):
            # L(theta + s z) = 1/B sum_b L_b(theta + s z); the data may have fewer batches than were asked for
            over = [self._at(one, points) for one in self.batches(batch, wide, step)]
            return directions, torch.stack(over).mean(0), queries - len(points) * (wide - len(over))
        return directions, self._at(batch, points, clean), queries

    def _per_example(
        self, batch: Any, directions: list[Direction], points: list[Point]
    ) -> tuple[list[Direction], Tensor]:
        """(every example's own directions, losses [P, B]), over the examples of all processes in their places."""
        examples = list(self.examples(batch))
        places = self.places(batch, len(examples))
        share = [points[number] for number in self.shares.questions(len(points))]
        losses = self.session.losses_per_example(examples, share, places[self.rank])
        losses = self._joined(losses, places, len(points))
        numbers = range(losses.shape[1])
        return [replace(direction, example=number) for direction in directions for number in numbers], losses

    def _of_each(self, batch: Any, points: list[Point], clean: Tensor | None) -> Tensor:
        """Each example's loss at all points, [P, B]; a clean loss that is known is taken for all of them."""
        queried = [point for point in points if clean is None or point.direction is not None]
        share = [queried[number] for number in self.shares.questions(len(queried))]
        losses = self.session.losses(self.each(batch), share).view(len(share), -1)
        all_losses = self._joined(losses, self.places(batch, losses.shape[1]), len(queried))
        if clean is None:
            return all_losses
        rows = iter(all_losses.unbind())
        return torch.stack([clean.expand(all_losses.shape[1]) if p.direction is None else next(rows) for p in points])

    def _joined(self, losses: Tensor, places: list[list[int]], number: int) -> Tensor:
        """[mine, B] of this process -> [P, B] of all, the columns in the order that one process would have."""
        if self.gather is not None:
            losses = torch.cat(self.gather(losses), dim=1)
        losses = self.shares.joined(losses, number)
        order = torch.tensor([place for of_rank in places for place in of_rank]).argsort()
        return losses[:, order]

    def _at(self, batch: Any, points: list[Point], clean: Tensor | None = None) -> Tensor:
        """The objective at some points, those at the anchor among them; a clean loss that is known is not asked for."""
        at_theta = [p for p in points if not p.anchor and (clean is None or p.direction is not None)]
        at_anchor = [p for p in points if p.anchor]
        losses = self._asked(batch, at_theta) if at_theta else torch.empty(0)
        of_theta, of_anchor = iter(losses.unbind()), iter(losses[:0].unbind())
        if at_anchor:  # all of them together: the weights go there and back once
            with self.session.at_anchor():
                of_anchor = iter(self._asked(batch, at_anchor).unbind())
        # back into the order of the points, in which estimators read their losses
        values = []
        for point in points:
            if point.anchor:
                values.append(next(of_anchor))
            elif point.direction is None and clean is not None:
                values.append(clean)
            else:
                values.append(next(of_theta))
        return torch.stack(values)

    def _asked(self, batch: Any, points: list[Point]) -> Tensor:
        """The objective at these points, each asked by one of the processes that have these rows."""
        if self.shares.count == 1:
            return self.average(self.session.losses(batch, points), batch)
        share = [points[number] for number in self.shares.questions(len(points))]
        losses = self.average(self.session.losses(batch, share), batch) if share else torch.empty(0)
        return self.shares.joined(losses, len(points))

    # ---- the estimate ------------------------------------------------------------------------------------------------

    def _measured(
        self, blank: StepEstimate, directions: list[Direction], losses: Tensor, estimator: Estimator,
        examples: Tensor | None = None,
    ) -> StepEstimate:  # fmt: skip
        """What the losses say: sum_j c_j z_j; without terms where a loss or a coefficient is not finite."""
        estimate = replace(blank, losses=losses)
        # a loss that is not finite makes no slope: the step has no terms and moves nothing
        if not bool(torch.isfinite(losses).all()):
            return replace(estimate, loss=float(estimator.loss(losses)))
        measured = estimator.measure(losses, estimate.memory["estimator"])
        estimate = replace(estimate, loss=float(measured.loss), projected_grads=measured.projected_grads)
        if examples is not None:  # [P, B] -> [Q, S, B]
            measured = replace(measured, examples=torch.stack([estimator.probe_losses(c) for c in examples.T], dim=-1))
        # a_j = weights(p, <z_i, z_j>); the inner products are dear, so a weighting asks for them
        gram = lambda: self.session.coordinates.gram(directions)  # noqa: E731
        coefficients = self.method.weighting.coefficients(measured, gram, estimate.memory["weighting"])
        if not bool(torch.isfinite(coefficients).all()):
            return estimate
        # some estimators change the terms here: an anchor's are added (svrg), a kernel weighs them (kernel)
        terms = estimator.terms(list(zip(directions, coefficients.tolist(), strict=True)), estimate.memory["estimator"])
        curvatures = None if measured.curvatures is None else measured.curvatures.tolist()
        return replace(estimate, terms=terms, curvatures=curvatures)

    def _with_gradient(self, blank: StepEstimate, batch: Any, estimator: Estimator) -> StepEstimate:
        """Part of the gradient from a backward pass, the rest from queries."""
        assert isinstance(estimator, NeedsBackward)
        directions = list(blank.directions)
        estimate = replace(blank, terms=[], num_queries=blank.num_queries + estimator.queries_at(blank.step))
        far, points = self.select(batch, estimator.queried_lengths), estimator.points(directions)
        is_queried = bool(points) and far is not None
        if is_queried:
            estimate = self._measured(replace(estimate, terms=None), directions, self._at(far, points), estimator)
            if not estimate.is_usable:
                return estimate
        near = self.select(batch, estimator.backpropagated_lengths)
        if near is None:
            return estimate
        # a hybrid backpropagates some tensors only, and no graph is kept below them
        names = frozenset(self.session.coordinates.backprop_names) or None
        loss, run = loss_with_graph(self.session, near, names)
        value = float(self.average(loss.view(1), near)[0])
        if not math.isfinite(value):
            # the backward pass has not run yet, so no gradient has been written when the step is given up
            return replace(estimate, terms=None, losses=loss.view(1), loss=value)
        share = estimator.share_of_backward(is_queried)
        # g = (1 - share) sum_j c_j z_j + share dL/dtheta; tensors that are backpropagated alone have no z, and share 1
        return replace(
            estimate.scaled(1.0 if names else 1.0 - share),
            backward=lambda take: run(lambda name, gradient: take(name, gradient.mul(share))),
            losses=torch.cat((estimate.losses, loss.view(1))),
            loss=value,
        )

    # ---- trying the step ---------------------------------------------------------------------------------------------

    def _try_the_step(self, estimate: StepEstimate, batch: Any, clean: float | None, lr: float) -> StepEstimate:
        """Ask the objective where the step would lead, and let the optimizer choose."""
        assert estimate.terms is not None
        rule = self.method.optimizer
        assert isinstance(rule, TriesSteps)
        first = estimate.terms[0][0]
        # u = sum_j c_j z_j as one direction; the points are theta - lr m u for every multiple m
        step = Direction(first.seed, first.step, -1, mix=tuple(estimate.terms))
        points = [Point(step, -lr * multiple) for multiple in rule.line_search]
        if clean is None:
            points.insert(0, Point())
        losses = self._at(batch, points).tolist()
        estimate = replace(estimate, num_queries=estimate.num_queries + len(points))
        at_clean = clean if clean is not None else losses.pop(0)
        if not all(map(math.isfinite, losses)):
            # a trial that is not finite leaves nothing to choose by: the step moves nothing
            return replace(estimate, terms=None)
        return estimate.scaled(rule.choose({0.0: at_clean, **dict(zip(rule.line_search, losses, strict=True))}))
