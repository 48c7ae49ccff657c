"""A `torch.optim.Optimizer` around an optimizer component, so that schedulers, checkpoints and callbacks find one.

It applies a :class:`zoft.step.estimate.StepEstimate` through the engine, and keeps everything that has to survive a
restart: the component's state tensors, the masters of weights of few bits (both float32), and the counters of the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoft.component import Memory
from zoft.engines._optional import KeepsWeightsAway, device_of, settle
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.source import CounterNoise
from zoft.optimizers._factors import Factors
from zoft.optimizers._optional import ReadsFactors, RescalesCoefficients
from zoft.optimizers.base import Estimate, Optimizer, Term
from zoft.step.estimate import StepEstimate
from zoft.subspaces.base import BoundSubspace
from zoft.weights.rounding import Rounding, Sum, follow_, round_sum
from zoft.weights.tensors import Weights


def decay_groups(weights: Weights, decayed: Iterable[str], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: the tensors that decay, and those that do not.

    Args:
        weights: what is trained.
        decayed: names of tensors that decay.
        weight_decay: per unit of learning rate.
    """
    names = set(decayed)
    return [
        {"params": [p for n, p in weights.tensors.items() if n in names], "weight_decay": weight_decay},
        {"params": [p for n, p in weights.tensors.items() if n not in names], "weight_decay": 0.0},
    ]


@dataclass
class Progress:
    """Counters of a run; they are saved with the optimizer.

    Args:
        steps: optimisation steps taken, skipped ones included; the directions' step number.
        updates: steps that moved the weights.
        num_queries: forward passes of the objective, clean ones included.
        num_tokens: tokens of the steps' batches times the steps' queries, over all processes.
        num_skipped: steps skipped because a loss was not finite.
        skipped_in_a_row: how many of the last steps were skipped.
        seconds: wall time of training steps.
        seconds_forward: wall time spent querying the objective.
        losses: training losses since the last log line, whose mean the next one says.
        num_guarded: steps that were far outside the running range and were shortened.
        recent: (loss, slope) of the last steps inside it, as many as ``guard_steps``.
        num_parts: into how many micro-batches were cut in the last step, where memory did not suffice.
    """

    steps: int = 0
    updates: int = 0
    num_queries: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    seconds_forward: float = 0.0
    losses: list[float] = field(default_factory=list)
    num_guarded: int = 0
    recent: list[list[float]] = field(default_factory=list)
    num_parts: int = 1


@dataclass(frozen=True)
class _Now:
    """What the writing of a step depends on beside its terms, so that it may be carried out later."""

    direction: Direction  # one of the step's
    number: int  # of the update
    curvatures: dict[Direction, float]  # along each of its directions
    records: list[list[Term]]  # the steps before it


class ZOOptimizer(torch.optim.Optimizer):
    """theta <- theta - lr * (update(estimate) + weight_decay * theta), group by group, chunk by chunk.

    Args:
        groups: parameter groups with ``params`` and ``weight_decay``.
        component: the optimizer component.
        session: the engine that writes the weights.
        learning_rate: initial learning rate of every group.
        rounding: how steps are written into bfloat16 and float16 weights; to nearest when left out.
        next_estimate: gives what :meth:`step` applies, for loops that call it without an argument.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        component: Optimizer,
        session: Session,
        learning_rate: float,
        rounding: Rounding | None = None,
        next_estimate: Callable[[], StepEstimate] | None = None,
    ) -> None:
        # where all tensors decay, or none does, one of the two groups is empty
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate, "weight_decay": 0.0})
        self.component = component
        self.rounding = rounding or Rounding("nearest")
        self.session = session
        self.next_estimate = next_estimate
        self.subspace: BoundSubspace = session.coordinates
        self.names = {id(tensor): name for name, tensor in session.weights.tensors.items()}
        self.progress = Progress()
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.masters: dict[str, Tensor] = {}  # name -> float32, flat
        self.sums: dict[str, Sum] = {}
        self.history: dict[str, tuple[int, Direction]] = {}  # name -> number of its updates, a direction of the last
        self.records: list[list[Term]] = []  # the last steps, as many as the component looks back at
        self._history_length = component.history_length
        remembered = component.init() if isinstance(component, RescalesCoefficients) else {}
        self.scalars: dict[str, Memory] = {"optimizer": remembered}  # what parts of the method remember
        self.direction: Direction | None = None  # one of the step in progress
        # set by begin(): numbers over the whole state that shape() needs, a norm for example
        self._context: Any = None
        # from here on every direction that is drawn goes through the rule, in queries and in the step alike
        if component.shapes_directions:
            self.subspace.arrange(shape=self._shape)

    # ---- what parts remember -----------------------------------------------------------------------------------------

    def remember(self, **memory: Memory) -> None:
        """Set the first memory of parts of the method; what a part has already stays."""
        for part, start in memory.items():
            self.scalars.setdefault(part, start)

    def memory(self) -> dict[str, Memory]:
        """A copy of what estimator and weighting remember."""
        return copy.deepcopy({part: memory for part, memory in self.scalars.items() if part != "optimizer"})

    # ---- a step begins -----------------------------------------------------------------------------------------------

    def begin(self, direction: Direction) -> None:
        """Before the queries of a step, once the subspace has begun it: the state is carried over to its basis.

        Args:
            direction: any of the step's.
        """
        # a state in the old basis would shape directions of the new one, so it is carried over first
        self.direction = direction
        for name in self.moments:
            self._transport(name, direction)
        if self.component.shapes_directions:
            moving = [name for name in self.names.values() if self.subspace.moves(direction, name)]
            self._context = self.component.shape_context({n: self._moments(n) for n in moving}, direction.step)

    def _shape(self, z: Tensor, name: str, where: slice | Tensor) -> Tensor:
        # z' = shape(z, state), element by element: the direction measured is the one applied, so both come through here
        state = {key: tensor.view(-1)[where] for key, tensor in self._moments(name).items()}
        return self.component.shape(z, state, self._context)

    def _moments(self, name: str) -> dict[str, Tensor]:
        """The state of a tensor; made when it is first asked for."""
        if name not in self.moments:
            device = device_of(self.session, name)
            self.moments[name] = {
                key: torch.full(shape, self.component.start_values.get(key, 0.0), dtype=torch.float32, device=device)
                for key, shape in self.component.state_shapes(self.subspace.shape(name)).items()
            }
        return self.moments[name]

    def _transport(self, name: str, direction: Direction) -> None:
        """Carry a tensor's state over to the basis of this direction."""
        if name not in self.history:
            return
        count, last = self.history[name]
        state = self.moments.get(name, {})  # a component may keep less of some tensors
        # What is linear in the estimate (a running mean) goes along with the basis; squares stay as they are.
        for key in self.component.linear_state:
            if key in state:
                state[key] = self.subspace.transport(name, state[key], last, direction)
        self.history[name] = count, direction

    # ---- a step is written -------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """:meth:`apply`, for a loop that knows no estimates (that of `transformers.Trainer`)."""
        if closure is not None:
            raise ValueError("a zeroth-order step takes no closure: the trainer has queried the objective already")
        assert self.next_estimate is not None, "apply(estimate) where nothing was given to take estimates from"
        self.apply(self.next_estimate())

    def apply(self, estimate: StepEstimate) -> None:
        """Write the step of an estimate; one that came to nothing moves nothing.

        Args:
            estimate: of a step that has begun (:meth:`begin`).
        """
        if estimate.terms is None:
            return
        # only now: an estimate that came to nothing has changed nothing that parts remember
        self.scalars.update(estimate.memory)
        if estimate.keeps_anchor:  # before the step: the anchor is where this step's losses were measured
            self.session.keep_anchor()
        terms = list(estimate.terms)
        self.direction = terms[0][0] if terms else estimate.directions[0]
        along: dict[Direction, float] = {}
        if estimate.curvatures:  # z_j^T H z_j by direction: a tensor may be moved by some of the step's only
            along = dict(zip([d for d, _ in terms], estimate.curvatures, strict=True))
        if isinstance(self.component, RescalesCoefficients):
            scaled = self.component.coefficients([coefficient for _, coefficient in terms], self.scalars["optimizer"])
            terms = [(d, coefficient) for (d, _), coefficient in zip(terms, scaled, strict=True)]
        # counted before the tensors are written: the number keys the random bits of rounding
        self.progress.updates += 1
        now = _Now(self.direction, self.progress.updates, along, list(self.records))
        # the tensors that are not written yet: the loops below take them out one by one
        unwritten = {self.names[id(parameter)]: group for group in self.param_groups for parameter in group["params"]}

        terms_of: dict[str, list[Term]] = {}
        for direction, coefficient in terms:
            for name in self.subspace.moving(direction):
                terms_of.setdefault(name, []).append((direction, coefficient))
        offloaded = self.session if isinstance(self.session, KeepsWeightsAway) else None
        can_wait = offloaded is not None and self._can_wait and estimate.backward is None and not estimate.factors

        # a tensor that no direction moves, and that has no gradient, is left alone: no decay either
        def write(name: str, dense: Tensor | None = None) -> None:
            group = unwritten.pop(name)
            moving = terms_of.get(name, [])
            if moving or dense is not None:
                parameter, lr, decay = self.session.weights.tensors[name], group["lr"], group["weight_decay"]
                move = partial(self._move, now, name, parameter, moving, lr, decay, dense)
                with torch.no_grad():
                    if offloaded is None:
                        move()
                    else:  # engine=offload: the tensor may rest in a file, and its step waits for the next visit
                        offloaded.write(name, move, can_wait=can_wait)

        # A backward pass hands over one gradient after the other, and frees it once its tensor is written.
        if estimate.backward is not None:
            estimate.backward(write)
        if estimate.factors:
            for name, factor in self._steps_of(estimate.factors, estimate.loss).items():
                write(name, factor.dense())
        for name in list(unwritten):
            write(name)
        # a window over the last steps' directions and coefficients, which are drawn again where they are needed
        if self._history_length:
            self.records = [*self.records, terms][-self._history_length :]

    def _steps_of(self, of_estimate: Mapping[str, Factors], loss: float) -> Mapping[str, Factors]:
        """The component's steps, made of all factors together; the factors themselves where it works on tensors."""
        factors = {name: factor.to(device_of(self.session, name)) for name, factor in of_estimate.items()}
        if not isinstance(self.component, ReadsFactors):
            return factors
        lr, states = float(self.param_groups[0]["lr"]), {name: self._moments(name) for name in factors}
        with torch.no_grad():
            return self.component.steps(factors, states, loss, lr)

    @property
    def _can_wait(self) -> bool:
        """Whether a step may be written later: nothing of the next step's queries reads what it changes.

        The coordinates are the tensors' own in every step, each draws by itself, and no component shapes directions.
        """
        source = self.subspace.source
        # BoundSubspace itself is subspace=full; others may read the weights when a step begins
        is_full = type(self.subspace) is BoundSubspace and isinstance(source, CounterNoise) and source.law != "sphere"
        return is_full and not self.component.shapes_directions

    def _move(
        self,
        now: _Now,
        name: str,
        parameter: nn.Parameter,
        terms: list[Term],
        lr: float,
        decay: float,
        dense: Tensor | None = None,
    ) -> None:
        direction = now.direction
        state = self._moments(name)
        self._transport(name, direction)
        count = self.history.get(name, (0, direction))[0] + 1  # of the tensor's updates, this one included
        self.history[name] = count, direction
        if dense is None and self._is_one_addition(parameter, terms, decay):
            self._add_direction(name, parameter, *terms[0], lr)
            return
        way, summed = self.rounding.way(parameter), self._sum_of(name, parameter, now)
        # one stream for as long as the sum lasts: round(s) must be the number that the weight has followed so far
        sum_bits = 0 if summed is None else self.rounding.key(summed.first, name, role="sum")
        rounds = way == "stochastic" and (summed is None or decay)  # what a sum says can be written as it is
        bits = self.rounding.key(now.number, name) if rounds else None
        for start, stop, update in self._updates(now, name, terms, state, count, dense):
            # lr = 0 in a warm-up: the state has moved, the weights do not; subtracting zero would turn -0.0 into +0.0
            if not lr:
                continue
            ends = None if summed is None else summed.add_(start, stop, update, lr)
            for first, last in self.subspace.pieces(name, start, stop):
                master = self._master_piece(name, first, last) if way == "master" else None
                theta = self.session.piece(name, first, last) if master is None else master
                if ends is None:
                    # theta <- theta - lr (lift(u) + decay theta), u the update in coordinates
                    step = self.subspace.lift(direction, name, update, start, first, last)
                    if decay:
                        step = step.add_(theta.to(step.dtype) * decay)
                    step = step.mul_(lr)
                else:
                    # theta <- theta - (round(lift(s + lr u)) - round(lift(s))) - lr decay theta, s the sum before
                    before, after = (self.subspace.lift(direction, name, c, start, first, last) for c in ends)
                    step = round_sum(theta, before, after, sum_bits, first)
                    if decay:
                        step = step.add_(theta.to(step.dtype) * (decay * lr))
                self.session.apply_(name, first, last, step, bits, master)

    def _updates(
        self, now: _Now, name: str, terms: list[Term], state: dict[str, Tensor], count: int, dense: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, the component's update) for every chunk of the coordinates."""
        all_at_once = [(0, math.prod(self.subspace.shape(name)))]
        records = [terms_ for record in now.records if (terms_ := self._record_of(now.direction, name, record))]
        curvatures = [now.curvatures[direction] for direction, _ in terms] if now.curvatures else None
        for start, stop in all_at_once if self.component.per_matrix else self.subspace.chunks(name):
            # state and piece are views of the same chunk: the rule updates them in place
            piece = None if dense is None else dense.view(-1)[start:stop]
            estimate = Estimate(self.subspace, name, start, stop, terms, curvatures, records, piece)
            of_piece = state if self.component.per_matrix else {key: t.view(-1)[start:stop] for key, t in state.items()}
            yield start, stop, self.component.update_from(estimate, of_piece, count).view(-1)

    def _record_of(self, now: Direction, name: str, record: list[Term]) -> list[Term]:
        """The terms of an earlier step that moved this tensor; none where its basis was another one."""
        moved = [term for term in record if self.subspace.moves(term[0], name)]
        return moved if all(self.subspace.same_basis(name, direction, now) for direction, _ in moved) else []

    def _sum_of(self, name: str, parameter: nn.Parameter, now: _Now) -> Sum | None:
        """The sum of the steps in the basis of this one, where one is kept."""
        direction, shape = now.direction, self.subspace.shape(name)
        if not self.rounding.sums(parameter, math.prod(shape)):
            return None
        summed = self.sums.get(name)
        if summed is None or not self.subspace.same_basis(name, summed.direction, direction):
            # coordinates in another basis are other numbers: what the old sum says is in the weights already
            total = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            summed = self.sums[name] = Sum(total, now.number, direction)
        summed.direction = direction
        return summed

    def _is_one_addition(self, parameter: nn.Parameter, terms: list[tuple[Direction, float]], decay: float) -> bool:
        """Whether the step is a multiple of one direction and can be made while it is added: the cheapest update.

        MeZO's own numbers have roundings in between.
        """
        is_multiple = self.component.is_identity and len(terms) == 1 and not decay
        return is_multiple and parameter.dtype == torch.float32 and isinstance(self.subspace.source, CounterNoise)

    def _add_direction(
        self, name: str, parameter: nn.Parameter, direction: Direction, coefficient: float, lr: float
    ) -> None:
        if not lr:  # a warm-up begins: the weights stay, wherever they are
            return
        # theta <- theta - lr c z
        theta = parameter.data.view(-1)
        for first, last in self.subspace.spans(name, 0, parameter.numel()):
            self.subspace.add_(theta[first:last], direction, name, first, -lr * coefficient)

    def _master_piece(self, name: str, first: int, last: int) -> Tensor:
        """A view of elements [first, last) of the float32 master, reset where something else changed the weight."""
        if name not in self.masters:
            self.masters[name] = self.session.weights.tensors[name].detach().to(torch.float32).view(-1)
        return follow_(self.masters[name][first:last], self.session.piece(name, first, last))

    # ---- saved and loaded --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, state tensors by name, and the groups without their parameters: tensors and plain numbers only."""
        settle(self.session)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        moments = {name: dict(tensors) for name, tensors in self.moments.items() if tensors}
        return {
            "rule": self.component.name(),  # the key that checkpoints have had from the first on
            "progress": asdict(self.progress),
            "state": moments,
            "masters": dict(self.masters),
            "history": {name: [count, asdict(last)] for name, (count, last) in self.history.items()},
            "sums": {name: asdict(summed) for name, summed in self.sums.items()},
            "records": [[[asdict(direction), coefficient] for direction, coefficient in r] for r in self.records],
            "scalars": self.scalars,
            "subspace": self.subspace.state_dict(),
            "anchor": self.session.anchor,
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; torch's own method would cast float32 state to the weights' dtype."""
        if state_dict["rule"] != self.component.name():
            raise UserError(
                f"the checkpoint was made with optimizer={state_dict['rule']}, this run has "
                f"optimizer={self.component.name()}: resume with the same one, or start a new run"
            )
        settle(self.session)
        self.progress = Progress(**state_dict["progress"])
        tensors, device = self.session.weights.tensors, partial(device_of, self.session)
        self.moments = {  # numbers of experts are integers
            name: {
                key: value.to(device(name), torch.float32 if value.is_floating_point() else value.dtype).clone()
                for key, value in state.items()
            }
            for name, state in state_dict["state"].items()
        }
        self.masters = {  # without one, or with another setting, the master begins at the weight
            name: master.to(device(name), torch.float32).clone()
            for name, master in state_dict.get("masters", {}).items()
            if self.rounding.way(tensors[name]) == "master"
        }
        self.sums = {  # without one the sum begins anew: what went before it has been written
            name: Sum(saved["total"].to(device(name)).clone(), saved["first"], Direction.from_dict(saved["direction"]))
            for name, saved in state_dict.get("sums", {}).items()
            if self.rounding.sums(tensors[name], saved["total"].numel())
        }
        self.history = {
            name: (count, Direction.from_dict(last)) for name, (count, last) in state_dict.get("history", {}).items()
        }
        self.records = [
            [(Direction.from_dict(direction), coefficient) for direction, coefficient in record]
            for record in state_dict.get("records", [])
        ]
        self.scalars |= copy.deepcopy(state_dict.get("scalars", {}))
        self.subspace.load_state_dict(state_dict.get("subspace", {}))
        anchor = state_dict.get("anchor")
        self.session.anchor = anchor and {n: saved.to(tensors[n]).clone() for n, saved in anchor.items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
