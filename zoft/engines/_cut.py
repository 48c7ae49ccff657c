"""A model cut into stages between its blocks: which parameters each process holds, and how they come together.

One forward of the whole says what a stage needs. A parameter that another process holds keeps its name, shape and dtype
and reads as zeros, in the memory of one number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from zoft.engines._prefix import hidden_states_in, longest_stack
from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.tensors import digest_of


@dataclass
class Cut:
    """Consecutive blocks for each of several processes, with what stands before the first and behind the last.

    Args:
        blocks: all of them, in the order in which they run.
        shares: for each process, the numbers of its blocks.
        held: for each process, the names of the parameters that its part of a forward reads. An embedding that is also
            the head is held by the first and the last one.
        entering: for each process, the hidden states [B, T, H] that its first block was given in the forward that this
            was found out by.
        left: the same of what its last block made of them.
        result: what that forward returned.
        width: 0 where blocks return a tensor, else how long their tuples are.
    """

    blocks: list[nn.Module]
    shares: list[range]
    held: list[set[str]]
    entering: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    result: Any = None
    width: int = 0


def check_stages(model: nn.Module, count: int) -> list[nn.Module]:
    """The blocks that a model is cut between.

    Raises:
        UserError: it has no chain of blocks, or fewer than there are processes.
    """
    blocks, config = longest_stack(model), getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not blocks:
        raise UserError(
            "trainer.parallel=pipeline cuts a model between blocks that run one after the other, and "
            f"{type(model).__name__} has no single stack of them: use trainer.parallel=directions"
        )
    if len(blocks) < count:
        raise UserError(
            f"trainer.parallel=pipeline gives every process one block at least, and {type(model).__name__} has "
            f"{len(blocks)} for {count} processes: start {len(blocks)} or fewer"
        )
    return blocks


def cut(model: nn.Module, count: int, forward: Callable[[], Any]) -> Cut:
    """Cut a model into ``count`` stages.

    Args:
        model: whole, in evaluation mode.
        count: number of processes.
        forward: a loss, by one call of the model.

    Raises:
        UserError: its blocks do not run once each, one after the other, or a stage would train nothing.
    """
    blocks = check_stages(model, count)
    shares = [range(rank * len(blocks) // count, (rank + 1) * len(blocks) // count) for rank in range(count)]
    stages = Cut(blocks, shares, [set() for _ in range(count)])
    ran: list[int] = []  # numbers of the blocks, as they were entered
    phases: dict[nn.Module, set[str]] = {}  # module -> when it ran
    phase = "before"

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal phase
        number = places.get(module)
        if number is not None:
            phase = "inside"
            ran.append(number)
            if number in starts:
                stages.entering.append(hidden_states_in(args, kwargs).clone())
        phases.setdefault(module, set()).add(phase)

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal phase
        number = places.get(module)
        if number is not None:
            stages.width = len(output) if isinstance(output, tuple) else 0
            if number in ends:
                stages.left.append((output[0] if stages.width else output).clone())
            if number == len(blocks) - 1:
                phase = "after"

    places = {block: number for number, block in enumerate(blocks)}
    starts, ends = {share.start for share in shares}, {share.stop - 1 for share in shares}
    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave))
        stages.result = forward()
    if ran != list(range(len(blocks))) or len(stages.entering) != count:
        raise UserError(
            f"trainer.parallel=pipeline: the blocks of {type(model).__name__} do not run once each, one after the "
            "other, for a loss: use trainer.parallel=directions"
        )
    _share_out(model, stages, phases)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = next((rank for rank, names in enumerate(stages.held) if trained.isdisjoint(names)), None)
    if idle is not None:
        raise UserError(
            f"trainer.parallel=pipeline: process {idle} of {count} would hold nothing that is trained: train tensors "
            "of all blocks (trainable=all, peft=lora), or use trainer.parallel=directions"
        )
    return stages


def _share_out(model: nn.Module, stages: Cut, phases: dict[nn.Module, set[str]]) -> None:
    """Decide which processes hold each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    count = len(stages.held)
    stage_of = {block: rank for rank, share in enumerate(stages.shares) for block in (stages.blocks[i] for i in share)}
    inside = {module: rank for block, rank in stage_of.items() for module in block.modules()}
    containers = {module for module in model.modules() if not stage_of.keys().isdisjoint(module.modules())}
    for module in model.modules():
        if module in inside:
            ranks = {inside[module]}
        elif (module in containers and module not in stage_of) or "inside" in phases.get(module, ()):
            ranks = set(range(count))  # it may read what it has at any time
        else:  # what never ran is the last one's, which has a loss to read it for
            ranks = {0 if when == "before" else count - 1 for when in phases.get(module, {"after"})}
        for parameter in module._parameters.values():
            if parameter is not None:
                for rank in ranks:
                    stages.held[rank].add(names[id(parameter)])


class HeldTensors:
    """The parameters of one model, each held by one process or several.

    Args:
        model: whole in every process; what this one does not hold is let go of by :meth:`drop`.
        held: for each process, the names of the parameters it holds; the first of these speaks for a parameter.
        rank: number of this process.
        device: where this process computes; what it holds goes there.
    """

    def __init__(self, model: nn.Module, held: Sequence[Collection[str]], rank: int, device: torch.device) -> None:
        self.model = model
        self.held = held
        self.rank = rank
        self.device = device
        self.parameters = dict(model.named_parameters())
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.num_trained = sum(self.parameters[name].numel() for name in self.trained)
        self.is_whole = True  # this process has, or is being given, all parameters

    def drop(self) -> None:
        """Free the parameters that other processes hold; they are not trained in this one."""
        held, trained = self.held[self.rank], set(self.trained)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in held and name in trained)
            if name in held:
                parameter.data = parameter.data.to(self.device)
            elif not _is_stand_in(parameter):
                zero = torch.zeros((), dtype=parameter.dtype, device=self.device)
                parameter.data = zero.expand(parameter.shape)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        self.is_whole = False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within this block the first process has the whole model; all processes come here, and may be inside it."""

        def gather() -> None:
            for name, tensor in self.gathered(self.parameters):
                if tensor is not None:
                    self.parameters[name].data = tensor
            if self.rank == 0:
                self._train_all()

        with self._whole_after(gather):
            yield

    @contextmanager
    def refilled(self) -> Iterator[None]:
        """Within this block every process has memory for all parameters, to read a checkpoint into them."""

        def allocate() -> None:
            for parameter in self.parameters.values():
                if _is_stand_in(parameter):
                    parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self.device)
            self._train_all()

        with self._whole_after(allocate):
            yield

    @contextmanager
    def _whole_after(self, fill: Callable[[], None]) -> Iterator[None]:
        """Within this block the model is whole, by ``fill`` unless it was so before, which keeps it so."""
        if self.is_whole:
            yield
            return
        fill()
        self.is_whole = True
        try:
            yield
        finally:
            self.drop()

    def gathered(self, names: Collection[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Parameters one after the other, in the first process; None in the others, which all come here.

        Args:
            names: of the parameters; the same in every process.
        """
        for name in names:
            holder, values = (
                next(rank for rank, names_held in enumerate(self.held) if name in names_held),
                self.parameters[name].data,
            )
            if self.is_whole or holder == 0:
                yield name, values if self.rank == 0 else None
            elif self.rank == 0:
                tensor = torch.empty(values.shape, dtype=values.dtype, device=self.device)
                torch.distributed.recv(_bytes_of(tensor), holder)
                yield name, tensor
            else:
                if self.rank == holder:
                    torch.distributed.send(_bytes_of(values.contiguous()), 0)
                yield name, None

    def digest(self) -> str:
        """The hash of all trained weights, in every process: that of one process which holds all of them."""
        digests = [digest_of((n, t) for n, t in self.gathered(self.trained) if t is not None)]
        torch.distributed.broadcast_object_list(digests, 0, device=self.device)
        return str(digests[0])

    def _train_all(self) -> None:
        for name in self.trained:
            self.parameters[name].requires_grad_(True)


def _is_stand_in(parameter: Tensor) -> bool:
    return parameter.numel() > 1 and not any(parameter.stride())


def _bytes_of(tensor: Tensor) -> Tensor:
    """A flat view of its bits: every backend sends bytes, and not every dtype."""
    return tensor.view(-1).view(torch.uint8)
