"""A `torch.optim.Optimizer` around an optimizer component, so that schedulers, checkpoints and callbacks find one.

It holds the estimate that the last queries gave, writes the step through the engine, and keeps everything that has
to survive a restart: the component's state tensors, the masters of weights of few bits (both float32), and the counters
of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.noise import CounterNoise, Direction
from zoft.optimizers.base import Optimizer
from zoft.rounding import Rounding, follow_, round_sum
from zoft.subspaces.base import Coordinates


@dataclass
class Progress:
    """Counters of a run; they are saved with the optimizer.

    Args:
        steps: optimisation steps taken, skipped ones included; the directions' step number.
        updates: steps that moved the weights.
        num_queries: forward passes of the objective, clean ones included.
        num_tokens: tokens that went through the model in those passes, over all processes.
        num_skipped: steps skipped because a loss was not finite.
        skipped_in_a_row: how many of the last steps were skipped.
        seconds: wall time of training steps.
        seconds_forward: wall time spent querying the objective.
        losses: training losses since the last log line, whose mean the next one says.
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


@dataclass
class Sum:
    """The steps that a tensor of few bits has taken in one basis, added up in coordinates.

    Args:
        total: float32, of the coordinates' shape: learning rate times update, summed.
        first: the number of the first of these updates; it names the random bits.
        direction: one of the last of these steps: it says which basis.
    """

    total: Tensor
    first: int
    direction: Direction

    def add_(self, start: int, stop: int, update: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Add a step to the coordinates [start, stop): the sum there before and after."""
        here = self.total.view(-1)[start:stop]
        before = here.clone()
        return before, here.add_(update, alpha=lr).clone()


class Stepper(torch.optim.Optimizer):
    """theta <- theta - lr * (update(estimate) + weight_decay * theta), group by group, chunk by chunk.

    Args:
        groups: parameter groups with ``params`` and ``weight_decay``.
        rule: the optimizer component.
        session: the engine that writes the weights.
        learning_rate: initial learning rate of every group.
        rounding: how steps are written into bfloat16 and float16 weights; to nearest when left out.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: Optimizer,
        session: Session,
        learning_rate: float,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__([group for group in groups if group["params"]], {"lr": learning_rate, "weight_decay": 0.0})
        self.rule = rule
        self.rounding = rounding or Rounding("nearest")
        self.session = session
        self.coordinates: Coordinates = session.coordinates
        self.names = {id(tensor): name for name, tensor in session.weights.tensors.items()}
        self.progress = Progress()
        self.pending: list[tuple[Direction, float]] | None = None
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.masters: dict[str, Tensor] = {}  # name -> float32, flat
        self.sums: dict[str, Sum] = {}
        self.history: dict[str, tuple[int, Direction]] = {}  # name -> number of its updates, a direction of the last

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the pending estimate; without one (a skipped step) nothing moves."""
        if closure is not None:
            raise ValueError("a zeroth-order step takes no closure: the trainer has queried the objective already")
        if self.pending is None:
            self.session.come_back()
            return
        terms, self.pending = self.pending, None
        self.progress.updates += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    name = self.names[id(parameter)]
                    if self.coordinates.moves(terms[0][0], name):
                        self._move(name, parameter, terms, group["lr"], group["weight_decay"])
            self.session.settle()

    def _move(
        self, name: str, parameter: nn.Parameter, terms: list[tuple[Direction, float]], lr: float, decay: float
    ) -> None:
        direction = terms[0][0]
        count, state = self._state_of(name, parameter, direction)
        way = self.rounding.way(parameter)
        if self._is_one_addition(parameter, terms, decay):
            self._add_direction(name, parameter, *terms[0], lr)
            return
        kept = self._sum_of(name, parameter, direction)
        sum_bits = 0 if kept is None else self.rounding.key(kept.first, name, role="sum")
        rounds = way == "stochastic" and (kept is None or decay)  # what a sum says can be written as it is
        bits = self.rounding.key(self.progress.updates, name) if rounds else None
        for start, stop in self.coordinates.chunks(name):
            estimate = self.coordinates.combination(name, start, stop, terms)
            pieces = {key: tensor.view(-1)[start:stop] for key, tensor in state.items()}
            update = self.rule.update(estimate, pieces, count)
            if not lr:  # subtracting zero would turn a weight of -0.0 into +0.0
                continue
            ends = None if kept is None else kept.add_(start, stop, update, lr)
            for first, last in self.coordinates.pieces(name, start, stop):
                self.session.arrive(name, first, last)
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
                self.session.depart(name, first, last)

    def _sum_of(self, name: str, parameter: nn.Parameter, direction: Direction) -> Sum | None:
        """The sum of the steps in the basis of this direction, where one is kept."""
        shape = self.coordinates.shape(name)
        if not self.rounding.sums(parameter, math.prod(shape)):
            return None
        kept = self.sums.get(name)
        if kept is None or not self.coordinates.same_basis(name, kept.direction, direction):
            total = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            kept = self.sums[name] = Sum(total, self.progress.updates, direction)
        kept.direction = direction
        return kept

    def _is_one_addition(self, parameter: nn.Parameter, terms: list[tuple[Direction, float]], decay: float) -> bool:
        """Whether the step is a multiple of one direction and can be made while it is added: the cheapest update.

        MeZO's own numbers have roundings in between.
        """
        linear = self.rule.hands_back and len(terms) == 1 and not decay
        return linear and parameter.dtype == torch.float32 and isinstance(self.coordinates.source, CounterNoise)

    def _add_direction(
        self, name: str, parameter: nn.Parameter, direction: Direction, coefficient: float, lr: float
    ) -> None:
        for first, last in self.coordinates.spans(name, 0, parameter.numel()) if lr else ():
            self.session.arrive(name, first, last)
            self.coordinates.add_(self.session.piece(name, first, last), direction, name, first, -lr * coefficient)
            self.session.depart(name, first, last)

    def _master_piece(self, name: str, first: int, last: int) -> Tensor:
        """A view of the master of the flat piece [first, last), which is the weight itself where it is none of ours."""
        if name not in self.masters:
            self.masters[name] = self.session.weights.tensors[name].detach().to(torch.float32).view(-1)
        return follow_(self.masters[name][first:last], self.session.piece(name, first, last))

    def _state_of(self, name: str, parameter: nn.Parameter, direction: Direction) -> tuple[int, dict[str, Tensor]]:
        """The number of this update of the tensor, and its state in the basis of this direction."""
        count, last = self.history.get(name, (0, direction))
        self.history[name] = count + 1, direction
        if name not in self.moments:
            shape = self.coordinates.shape(name)
            self.moments[name] = {
                key: torch.zeros(shape, dtype=torch.float32, device=parameter.device) for key in self.rule.state_names()
            }
        state = self.moments[name]
        for key in self.rule.carried:
            state[key] = self.coordinates.transport(name, state[key], last, direction)
        return count + 1, state

    def state_dict(self) -> dict[str, Any]:
        """Counters, state tensors by name, and the groups without their parameters: tensors and plain numbers only."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        moments = {name: dict(tensors) for name, tensors in self.moments.items() if tensors}
        return {
            "rule": self.rule.name(),
            "progress": asdict(self.progress),
            "state": moments,
            "masters": dict(self.masters),
            "history": {name: [count, asdict(last)] for name, (count, last) in self.history.items()},
            "sums": {name: asdict(kept) for name, kept in self.sums.items()},
            "param_groups": groups,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The other way round; torch's own would cast float32 state to the weights' dtype."""
        if state_dict["rule"] != self.rule.name():
            raise UserError(
                f"the checkpoint was made with optimizer={state_dict['rule']}, this run has "
                f"optimizer={self.rule.name()}: resume with the same one, or start a new run"
            )
        self.progress = Progress(**state_dict["progress"])
        tensors = self.session.weights.tensors
        self.moments = {
            name: {key: value.to(tensors[name].device, torch.float32).clone() for key, value in state.items()}
            for name, state in state_dict["state"].items()
        }
        self.masters = {  # without one, or with another setting, the master begins at the weight
            name: master.to(tensors[name].device, torch.float32).clone()
            for name, master in state_dict.get("masters", {}).items()
            if self.rounding.way(tensors[name]) == "master"
        }
        self.sums = {  # without one the sum begins anew: what went before it has been written
            name: Sum(kept["total"].to(tensors[name].device).clone(), kept["first"], Direction(**kept["direction"]))
            for name, kept in state_dict.get("sums", {}).items()
            if self.rounding.sums(tensors[name], kept["total"].numel())
        }
        self.history = {
            name: (count, Direction(**last)) for name, (count, last) in state_dict.get("history", {}).items()
        }
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
