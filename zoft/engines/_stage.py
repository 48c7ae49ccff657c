"""A pipeline of processes: each perturbs, computes and writes its own blocks, and all points go through together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoft.engines._cut import HeldTensors, cut
from zoft.engines._prefix import hidden_states_in, with_hidden_states
from zoft.engines.base import Engine, Objective, Session, memory_errors_say, refuse_derivatives
from zoft.engines.layerwise import LayerwiseSession
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

_SPARE = 1.25  # receive buffers this much larger than what is sent serve; larger or smaller ones are made anew


class HandedOn(BaseException):
    """Ends a forward in this process: the next one goes on with its hidden states.

    Args:
        hidden: [B, T, H].
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Stage:
    """This process's blocks of a model; every process calls the objective, and each computes its part of the model.

    A forward runs as ever up to the first block of this process, goes on there with the hidden states that the process
    before has sent, and ends behind its last block: only the last process comes to logits and loss. What a class makes
    of the rows in front of its blocks (masks, positions) every process makes for itself.

    Args:
        model: whole, in evaluation mode; afterwards its other blocks are empty.
        rank: number of this process.
        count: of how many.
        device: where it computes.
        forward: a loss of any rows, by one call of the model: it shows what a stage needs, and that it is enough.
        gather: float64 numbers of this process -> those of each.

    Attributes:
        held: the parameters that this process has.
        bytes_sent: of hidden states, so far.

    Raises:
        UserError: (in all processes) more than hidden states goes from block to block.
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int,
        count: int,
        device: torch.device,
        forward: Callable[[], Any],
        gather: Callable[[Tensor], list[Tensor]],
    ) -> None:
        stages = cut(model, count, forward)
        self.rank, self.count, self.device = rank, count, device
        self.is_last = rank == count - 1
        self.gather = gather
        self.held = HeldTensors(model, stages.held, rank, device)
        self.bytes_sent = 0
        self._blocks, self._share = stages.blocks, stages.shares[rank]
        self._dtype = stages.entering[rank].dtype
        self._item = max(hidden.element_size() for hidden in stages.entering)  # bytes of a number on its way
        self._width = stages.width
        self._received: Tensor | None = None  # of the forward at hand, bytes
        self._has_entered = self._is_measuring = False
        self._schedule: Any = None
        self._buffers = (0, 0)  # forwards and bytes of each that the schedule has memory for
        self._run: _Schedule | None = None
        self.held.drop()
        self._hook()
        self._check(stages.entering[rank].to(device), stages.left[rank].to(device), stages.result, forward)

    # ---- the model's blocks ------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        """Hook the model so that its forwards compute this process's part."""
        for block in self._blocks[: self._share.start]:
            block.forward = self._passes_on
        self._blocks[0].register_forward_pre_hook(self._measure, with_kwargs=True, prepend=True)
        if self.rank:
            self._blocks[self._share.start].register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        if not self.is_last:
            self._blocks[self._share.stop - 1].register_forward_hook(self._leave)

    def _passes_on(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block of an earlier process."""
        hidden = hidden_states_in(args, kwargs)
        return (hidden, *[None] * (self._width - 1)) if self._width else hidden

    def _measure(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_measuring:
            raise HandedOn(hidden_states_in(args, kwargs))
        if self._has_entered:
            raise UserError(
                "trainer.parallel=pipeline: the model is called more than once for a loss: use "
                "trainer.parallel=directions"
            )
        self._has_entered = True

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = hidden_states_in(args, kwargs)
        if self._received is None:
            raise UserError(
                "trainer.parallel=pipeline: the model was called by other code than the trainer's compute_loss or the "
                "objective, in which all processes call it together: use trainer.parallel=data or directions"
            )
        # the stand-in has the shape: rows, tokens and width are the same in every process
        count = like.numel() * self._dtype.itemsize
        hidden = self._received[:count].view(self._dtype).view(like.shape)
        return with_hidden_states(hidden, args, kwargs)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        raise HandedOn(output[0] if self._width else output)

    def _check(self, entering: Tensor, left: Tensor, result: Any, forward: Callable[[], Any]) -> None:
        """Refuse a cut after which this process's part computes something else than in the whole model."""
        self._received = entering.contiguous().view(-1).view(torch.uint8)
        self._has_entered = False
        with torch.no_grad():
            try:
                is_same = _close(forward(), result)
            except HandedOn as handed:
                is_same = _close(handed.hidden, left)
        self._received = None
        if not all(bool(one.item()) for one in self.gather(torch.tensor([float(is_same)], dtype=torch.float64))):
            raise UserError(
                "trainer.parallel=pipeline sends hidden states from block to block, and with these settings "
                f"{type(self.held.model).__name__} hands on more than that: use trainer.parallel=directions"
            )

    @property
    def is_running(self) -> bool:
        """Whether a forward of a schedule is being computed."""
        return self._is_measuring or self._run is not None

    # ---- forwards ----------------------------------------------------------------------------------------------------

    def run(self, calls: Sequence[Callable[[], Any]], kinds: Sequence[Hashable]) -> list[Any]:
        """Forwards through all processes, in one schedule: each begins as soon as the one before has left a stage.

        Args:
            calls: every process gives the same; each calls the model once.
            kinds: equal for calls of the same rows, whose hidden states have one size.

        Returns:
            What the calls return, in the last process; None for each in the others.
        """
        first_of = dict(zip(reversed(kinds), reversed(calls), strict=True))
        with torch.inference_mode(False), torch.no_grad():
            size = max(map(self._bytes_of, first_of.values()))
            schedule = self._schedule_for(len(calls), size)
            self._run = run = _Schedule(calls, [None] * len(calls))
            numbers = torch.arange(len(calls))
            try:
                schedule.eval(*([] if self.rank else [numbers]), number=numbers)
            except RuntimeError as error:  # the schedule wraps what a stage raises
                raise error.__cause__ or error from None
            finally:
                self._run = self._received = None
                schedule._stage.clear_runtime_states()
        self.bytes_sent += 0 if self.is_last else len(calls) * self._buffers[1]
        return run.results

    def everywhere(self, call: Callable[[], Any]) -> Any:
        """The last process's result of a call that calls the model once, in every process; tensors and numbers."""
        (result,) = self.run([call], [0])
        results = [_moved(result, torch.device("cpu"))]
        torch.distributed.broadcast_object_list(results, self.count - 1, device=self.device)
        return _moved(results[0], self.device)

    def _bytes_of(self, call: Callable[[], Any]) -> int:
        """How large the hidden states of a call are, by its forward up to the first block."""
        self._is_measuring = True
        try:
            call()
        except HandedOn as handed:
            return handed.hidden.numel() * self._item
        finally:
            self._is_measuring = False
        raise RuntimeError("trainer.parallel=pipeline: the objective does not call the model's blocks")

    def _schedule_for(self, count: int, size: int) -> Any:
        """A schedule with memory for ``count`` forwards of ``size`` bytes each; the last one where it serves."""
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        if self._buffers[0] != count or not size <= self._buffers[1] <= _SPARE * size:
            self._schedule = None  # its memory is free before the next one's is taken
            wire, done = torch.empty(size, dtype=torch.uint8, device=self.device), torch.zeros(1, device=self.device)
            part: Any = torch.nn.Identity()  # a module, as a stage wants one
            part.forward = lambda received, number: self._compute(int(number), received)
            stage = PipelineStage(
                part,
                self.rank,
                self.count,
                self.device,
                input_args=wire if self.rank else torch.zeros(1, dtype=torch.int64),
                output_args=done if self.is_last else wire,
            )
            self._schedule, self._buffers = ScheduleGPipe(stage, count), (count, size)
        return self._schedule

    def _compute(self, number: int, received: Tensor) -> Tensor:
        """This process's part of a forward: bytes of hidden states in, and out."""
        assert self._run is not None
        self._received, self._has_entered = received, False
        try:
            self._run.results[number] = self._run.calls[number]()
        except HandedOn as handed:
            sent = torch.zeros(self._buffers[1], dtype=torch.uint8, device=self.device)
            numbers = handed.hidden.contiguous().view(-1).view(torch.uint8)
            sent[: numbers.numel()] = numbers
            return sent
        return torch.zeros(1, device=self.device)


@dataclass
class _Schedule:
    """The forwards of one schedule, and what they returned."""

    calls: Sequence[Callable[[], Any]]
    results: list[Any]


class Pipeline(Engine):
    """The engine of ``trainer.parallel=pipeline``; its numbers are those of ``engine=layerwise``.

    All points times micro-batches of a step are the micro-batches of one GPipe schedule. z is made for every point
    anew, by each process for its own tensors.

    Args:
        stage: this process's part of the model.
        parts: a batch -> one for each call of the model.
        joined: a batch and the losses of its parts -> its loss.
        piece_mb: as for ``engine=layerwise``.

    References: Huang et al. 2019 (GPipe), for the schedule; a zeroth-order step has its forward half alone.
    """

    def __init__(
        self,
        stage: Stage,
        parts: Callable[[Any], Sequence[Any]],
        joined: Callable[[Any, Sequence[Tensor]], Tensor],
        piece_mb: int = 0,
    ) -> None:
        self.stage = stage
        self.parts = parts
        self.joined = joined
        self.piece_mb = piece_mb

    @classmethod
    def name(cls) -> str:
        """The engine's name in reports."""
        return "pipeline"

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """The model is this process's part, and so are the coordinates."""
        return PipelineSession(model, coordinates, objective, self)


class PipelineSession(LayerwiseSession):
    """The forwards of a step in one schedule; every process has all losses at its end."""

    name = "pipeline"

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, engine: Pipeline) -> None:
        super().__init__(model, coordinates, objective, engine.piece_mb)
        self.engine = engine
        self.stage = engine.stage

    def evaluate_all(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        """The objective of each batch at its point: the last process's numbers, in all of them."""
        refuse_derivatives([point for _, point in pairs], self.name)
        survey = self.survey
        with memory_errors_say(self.what_to_lower()), self._hooks(), self._no_graph():
            if not survey.is_done:
                losses, again = self._asked(pairs, lambda: survey.conclude(self.swapper.state))
            else:
                with survey.later(lambda: self._scheduled(pairs[:1])):
                    losses, again = self._asked(pairs, survey.find_new)
            if again:  # some process perturbs a tensor for its whole part from now on
                losses, _ = self._asked(pairs, lambda: False)
        return losses

    def _asked(self, pairs: list[tuple[Any, Point]], look: Callable[[], bool]) -> tuple[list[Tensor], bool]:
        """The losses, and whether any process has to ask again; one gather of both."""
        losses = self._scheduled(pairs)
        losses_here = torch.stack([*losses, torch.tensor(float(look()))]).double()  # float64 holds every float32
        everyone = self.stage.gather(losses_here)
        return list(everyone[-1][:-1].float().unbind()), any(bool(one[-1]) for one in everyone)

    def _scheduled(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        """All forwards in one schedule: the losses, in the last process; zeros in the others."""
        parts = [self.engine.parts(batch) for batch, _ in pairs]
        # points of one batch ask for the same rows
        units = [
            (part, point, (id(batch), number))
            for (batch, point), some in zip(pairs, parts, strict=True)
            for number, part in enumerate(some)
        ]
        calls = [partial(self._loss_at, part, point) for part, point, _ in units]
        results = iter(self.stage.run(calls, [kind for *_, kind in units]))
        of_each = [[next(results) for _ in some] for some in parts]
        if not self.stage.is_last:
            return [torch.zeros(()) for _ in pairs]
        return [self.engine.joined(batch, losses) for (batch, _), losses in zip(pairs, of_each, strict=True)]


def _close(value: Tensor, wanted: Tensor) -> bool:
    """Whether a stage computes what the whole model did: to the bit on the CPU, where the whole has computed."""
    if value.device.type == "cpu":
        return torch.equal(value, wanted)
    wanted = wanted.to(value.device).float()
    return bool((value.float() - wanted).abs().max() <= 0.05 * wanted.abs().max())


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if isinstance(value, (tuple, list)) else value
