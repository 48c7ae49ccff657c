"""A `torch.optim.Optimizer` around an optimizer component, so that schedulers, checkpoints and callbacks find one.

It applies a :class:`zoft.step.estimate.StepEstimate` through the engine, and keeps everything that has to survive a
restart: the component's state tensors, the masters of weights of few bits (both float32), and the counters of the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoft.engines._away import device_of, settle
from zoft.engines._away import write as write_away
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.source import CounterNoise
from zoft.optimizers._factors import Factors
from zoft.optimizers._optional import ReadsFactors, RescalesCoefficients
from zoft.optimizers.base import Estimate, Optimizer, Term
from zoft.step.estimate import StepEstimate
from zoft.step.progress import Progress, Sum
from zoft.subspaces.base import BoundSubspace
from zoft.weights.rounding import Rounding, follow_, round_sum
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


@dataclass(frozen=True)
class _Now:
    """What the writing of a step depends on beside its terms, so that it may be carried out later."""

    direction: Direction  # one of the step's
    number: int  # of the update
    bends: dict[Direction, float]  # the curvature along each of its directions
    records: list[list[Term]]  # the steps before it


class ZOOptimizer(torch.optim.Optimizer):
    """theta <- theta - lr * (update(estimate) + weight_decay * theta), group by group, chunk by chunk.

    Args:
        groups: parameter groups with ``params`` and ``weight_decay``.
        rule: the optimizer component.
        session: the engine that writes the weights.
        learning_rate: initial learning rate of every group.
        rounding: how steps are written into bfloat16 and float16 weights; to nearest when left out.
        next_estimate: gives what :meth:`step` applies, for loops that call it without an argument.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: Optimizer,
        session: Session,
        learning_rate: float,
        rounding: Rounding | None = None,
        next_estimate: Callable[[], StepEstimate] | None = None,
    ) -> None:
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate, "weight_decay": 0.0})
        self.rule = rule
        self.rounding = rounding or Rounding("nearest")
        self.session = session
        self.next_estimate = next_estimate
        self.coordinates: BoundSubspace = session.coordinates
        self.names = {id(tensor): name for name, tensor in session.weights.tensors.items()}
        self.progress = Progress()
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.masters: dict[str, Tensor] = {}  # name -> float32, flat
        self.sums: dict[str, Sum] = {}
        self.history: dict[str, tuple[int, Direction]] = {}  # name -> number of its updates, a direction of the last
        self.records: list[list[Term]] = []  # the last steps, as many as the rule looks back at
        remembered = rule.init() if isinstance(rule, RescalesCoefficients) else {}
        self.scalars: dict[str, dict[str, Any]] = {"optimizer": remembered}  # what parts of the method remember
        self.direction: Direction | None = None  # one of the step in progress
        self._context: dict[str, Any] = {}
        if rule.shapes_directions:
            self.coordinates.arrange(shape=self._shape)

    # ---- what parts remember -----------------------------------------------------------------------------------------

    def remember(self, **memory: dict[str, Any]) -> None:
        """What parts of the method begin with, where nothing of theirs is known yet."""
        for part, start in memory.items():
            self.scalars.setdefault(part, start)

    def memory(self) -> dict[str, dict[str, Any]]:
        """A copy of what estimator and weighting remember."""
        return copy.deepcopy({part: kept for part, kept in self.scalars.items() if part != "optimizer"})

    # ---- a step begins -----------------------------------------------------------------------------------------------

    def begin(self, direction: Direction) -> None:
        """Before the queries of a step, once the subspace has begun it: the state is carried over to its basis.

        Args:
            direction: any of the step's.
        """
        self.direction = direction
        for name in self.moments:
            self._transport(name, direction)
        if self.rule.shapes_directions:
            moving = [name for name in self.names.values() if self.coordinates.moves(direction, name)]
            self._context = self.rule.shape_context({n: self._moments(n) for n in moving}, direction.step)

    def _shape(self, z: Tensor, name: str, where: slice | Tensor) -> Tensor:
        state = {key: tensor.view(-1)[where] for key, tensor in self._moments(name).items()}
        return self.rule.shape(z, state, self._context)

    def _moments(self, name: str) -> dict[str, Tensor]:
        """The state of a tensor; made when it is first asked for."""
        if name not in self.moments:
            device = device_of(self.session, name)
            self.moments[name] = {
                key: torch.full(shape, self.rule.start_values.get(key, 0.0), dtype=torch.float32, device=device)
                for key, shape in self.rule.state_shapes(self.coordinates.shape(name)).items()
            }
        return self.moments[name]

    def _transport(self, name: str, direction: Direction) -> None:
        """Carry a tensor's state over to the basis of this direction."""
        if name not in self.history:
            return
        count, last = self.history[name]
        state = self.moments.get(name, {})  # a rule may keep less of some tensors
        for key in (key for key in self.rule.linear_state if key in state):
            state[key] = self.coordinates.transport(name, state[key], last, direction)
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
        self.scalars.update(estimate.memory)
        if estimate.keeps_anchor:
            self.session.keep_anchor()
        terms = list(estimate.terms)
        self.direction = terms[0][0] if terms else estimate.directions[0]
        curvatures = estimate.curvatures or ()
        bends = dict(zip((d for d, _ in terms), curvatures, strict=bool(curvatures)))
        if isinstance(self.rule, RescalesCoefficients):
            scaled = self.rule.coefficients([coefficient for _, coefficient in terms], self.scalars["optimizer"])
            terms = [(d, coefficient) for (d, _), coefficient in zip(terms, scaled, strict=True)]
        self.progress.updates += 1
        now = _Now(self.direction, self.progress.updates, bends, list(self.records))
        can_wait = self._can_wait and estimate.backward is None and not estimate.factors
        left = {self.names[id(parameter)]: group for group in self.param_groups for parameter in group["params"]}

        def write(name: str, dense: Tensor | None = None) -> None:
            group, mine = left.pop(name), [term for term in terms if self.coordinates.moves(term[0], name)]
            if mine or dense is not None:
                parameter, lr, decay = self.session.weights.tensors[name], group["lr"], group["weight_decay"]
                move = partial(self._move, now, name, parameter, mine, lr, decay, dense)
                with torch.no_grad():
                    write_away(self.session, name, move, can_wait=can_wait)

        if estimate.backward is not None:
            estimate.backward(write)
        for name, factor in self._steps_of(estimate, float(self.param_groups[0]["lr"])).items():
            write(name, factor.dense())
        for name in list(left):
            write(name)
        if self.rule.history_length:
            self.records = [*self.records, terms][-self.rule.history_length :]

    def _steps_of(self, estimate: StepEstimate, lr: float) -> Mapping[str, Factors]:
        """What the rule makes of all factors together; themselves where it works on tensors."""
        factors = {name: factor.to(device_of(self.session, name)) for name, factor in (estimate.factors or {}).items()}
        if not factors or not isinstance(self.rule, ReadsFactors):
            return factors
        with torch.no_grad():
            return self.rule.steps(factors, {name: self._moments(name) for name in factors}, estimate.loss, lr)

    @property
    def _can_wait(self) -> bool:
        """Whether a step may be written later: nothing of the next step's queries reads what it changes.

        The coordinates are the tensors' own in every step, each draws by itself, and no rule shapes directions.
        """
        source = self.coordinates.source
        own = type(self.coordinates) is BoundSubspace and isinstance(source, CounterNoise) and source.law != "sphere"
        return own and not self.rule.shapes_directions

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
        count, state = self._state_of(name, direction)
        way = self.rounding.way(parameter)
        if dense is None and self._is_one_addition(parameter, terms, decay):
            self._add_direction(name, parameter, *terms[0], lr)
            return
        kept = self._sum_of(name, parameter, now)
        sum_bits = 0 if kept is None else self.rounding.key(kept.first, name, role="sum")
        rounds = way == "stochastic" and (kept is None or decay)  # what a sum says can be written as it is
        bits = self.rounding.key(now.number, name) if rounds else None
        for start, stop, update in self._updates(now, name, terms, state, count, dense):
            if not lr:  # subtracting zero would turn a weight of -0.0 into +0.0
                continue
            ends = None if kept is None else kept.add_(start, stop, update, lr)
            for first, last in self.coordinates.pieces(name, start, stop):
                master = self._master_piece(name, first, last) if way == "master" else None
                theta = self.session.piece(name, first, last) if master is None else master
                if ends is None:
                    step = self.coordinates.lift(direction, name, update, start, first, last)
                    if decay:
                        step = step.add_(theta.to(step.dtype) * decay)
                    step = step.mul_(lr)
                else:
                    before, after = (self.coordinates.lift(direction, name, c, start, first, last) for c in ends)
                    step = round_sum(theta, before, after, sum_bits, first)
                    if decay:
                        step = step.add_(theta.to(step.dtype) * (decay * lr))
                self.session.apply_(name, first, last, step, bits, master)

    def _updates(
        self, now: _Now, name: str, terms: list[Term], state: dict[str, Tensor], count: int, dense: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, what the rule makes of the estimate) for every chunk of the coordinates."""
        whole = [(0, math.prod(self.coordinates.shape(name)))]
        records = [mine for record in now.records if (mine := self._record_of(now.direction, name, record))]
        curvatures = [now.bends[direction] for direction, _ in terms] if now.bends else None
        for start, stop in whole if self.rule.per_matrix else self.coordinates.chunks(name):
            piece = None if dense is None else dense.view(-1)[start:stop]
            estimate = Estimate(self.coordinates, name, start, stop, terms, curvatures, records, piece)
            of_piece = state if self.rule.per_matrix else {key: t.view(-1)[start:stop] for key, t in state.items()}
            yield start, stop, self.rule.update_from(estimate, of_piece, count).view(-1)

    def _record_of(self, now: Direction, name: str, record: list[Term]) -> list[Term]:
        """The terms of an earlier step that moved this tensor; none where its basis was another one."""
        coordinates = self.coordinates
        mine = [term for term in record if coordinates.moves(term[0], name)]
        return mine if all(coordinates.same_basis(name, direction, now) for direction, _ in mine) else []

    def _sum_of(self, name: str, parameter: nn.Parameter, now: _Now) -> Sum | None:
        """The sum of the steps in the basis of this direction, where one is kept."""
        direction = now.direction
        shape = self.coordinates.shape(name)
        if not self.rounding.sums(parameter, math.prod(shape)):
            return None
        kept = self.sums.get(name)
        if kept is None or not self.coordinates.same_basis(name, kept.direction, direction):
            total = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            kept = self.sums[name] = Sum(total, now.number, direction)
        kept.direction = direction
        return kept

    def _is_one_addition(self, parameter: nn.Parameter, terms: list[tuple[Direction, float]], decay: float) -> bool:
        """Whether the step is a multiple of one direction and can be made while it is added: the cheapest update.

        MeZO's own numbers have roundings in between.
        """
        linear = self.rule.is_identity and len(terms) == 1 and not decay
        return linear and parameter.dtype == torch.float32 and isinstance(self.coordinates.source, CounterNoise)

    def _add_direction(
        self, name: str, parameter: nn.Parameter, direction: Direction, coefficient: float, lr: float
    ) -> None:
        for first, last in self.coordinates.spans(name, 0, parameter.numel()) if lr else ():
            self.coordinates.add_(self.session.piece(name, first, last), direction, name, first, -lr * coefficient)

    def _master_piece(self, name: str, first: int, last: int) -> Tensor:
        """A view of the master of the flat piece [first, last), which is the weight itself where it is none of ours."""
        if name not in self.masters:
            self.masters[name] = self.session.weights.tensors[name].detach().to(torch.float32).view(-1)
        return follow_(self.masters[name][first:last], self.session.piece(name, first, last))

    def _state_of(self, name: str, direction: Direction) -> tuple[int, dict[str, Tensor]]:
        """The number of this update of the tensor, and its state in the basis of this direction."""
        state = self._moments(name)
        self._transport(name, direction)
        count = self.history.get(name, (0, direction))[0] + 1
        self.history[name] = count, direction
        return count, state

    # ---- saved and loaded --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, state tensors by name, and the groups without their parameters: tensors and plain numbers only."""
        settle(self.session)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        moments = {name: dict(tensors) for name, tensors in self.moments.items() if tensors}
        return {
            "rule": self.rule.name(),
            "progress": asdict(self.progress),
            "state": moments,
            "masters": dict(self.masters),
            "history": {name: [count, asdict(last)] for name, (count, last) in self.history.items()},
            "sums": {name: asdict(kept) for name, kept in self.sums.items()},
            "records": [[[asdict(direction), coefficient] for direction, coefficient in r] for r in self.records],
            "scalars": self.scalars,
            "subspace": self.coordinates.state_dict(),
            "anchor": self.session.anchor,
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other way round; torch's own would cast float32 state to the weights' dtype."""
        if state_dict["rule"] != self.rule.name():
            raise UserError(
                f"the checkpoint was made with optimizer={state_dict['rule']}, this run has "
                f"optimizer={self.rule.name()}: resume with the same one, or start a new run"
            )
        settle(self.session)
        self.progress = Progress(**state_dict["progress"])
        tensors, device = self.session.weights.tensors, partial(device_of, self.session)
        self.moments = {
            name: {key: value.to(device(name), torch.float32).clone() for key, value in state.items()}
            for name, state in state_dict["state"].items()
        }
        self.masters = {  # without one, or with another setting, the master begins at the weight
            name: master.to(device(name), torch.float32).clone()
            for name, master in state_dict.get("masters", {}).items()
            if self.rounding.way(tensors[name]) == "master"
        }
        self.sums = {  # without one the sum begins anew: what went before it has been written
            name: Sum(kept["total"].to(device(name)).clone(), kept["first"], Direction.from_dict(kept["direction"]))
            for name, kept in state_dict.get("sums", {}).items()
            if self.rounding.sums(tensors[name], kept["total"].numel())
        }
        self.history = {
            name: (count, Direction.from_dict(last)) for name, (count, last) in state_dict.get("history", {}).items()
        }
        self.records = [
            [(Direction.from_dict(direction), coefficient) for direction, coefficient in record]
            for record in state_dict.get("records", [])
        ]
        self.scalars |= copy.deepcopy(state_dict.get("scalars", {}))
        self.coordinates.load_state_dict(state_dict.get("subspace", {}))
        anchor = state_dict.get("anchor")
        self.session.anchor = anchor and {n: saved.to(tensors[n]).clone() for n, saved in anchor.items()}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
