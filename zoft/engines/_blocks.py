"""The blocks of a model whose weights rest elsewhere: brought when their forward begins, the next one on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from zoft.engines._swapper import Lease, aligned
from zoft.engines._transfer import Transfer
from zoft.utils.lazy import Tensor, nn, torch
from zoft.weights.mapped import release


@dataclass
class Block:
    """A module whose tensors come and go together.

    Args:
        module: its forward is what they are needed for.
        tensors: its own parameters, by name; none of them belongs to anything else.
    """

    module: nn.Module
    tensors: dict[str, nn.Parameter]
    resting: dict[str, Tensor] = field(default_factory=dict)  # where they rest, while they are on the device
    lease: Lease | None = None  # memory of the device, from the beginning of the copy on
    ticket: Any = None  # of the copy up, until it has been waited for
    inside: int = 0  # forwards that are in it
    moved: set[str] = field(default_factory=set)  # since it was brought: what rests of these is older

    @property
    def num_bytes(self) -> int:
        """Bytes that the block takes on the device."""
        return sum(aligned(tensor.numel() * tensor.element_size()) for tensor in self.tensors.values())


class BlockStream:
    """Brings blocks to the device and puts them back: two of them are there at a time.

    A block is brought when a forward enters it; the one that came after it the last time is on its way meanwhile, in
    the memory of the one before. Between calls all of them rest (:meth:`rest`), and what their parameters have then is
    what the next visit brings. Steps wait for the next visit of their block, or for :meth:`settle`. Whatever order
    blocks are entered in, what computes has the right weights: another order costs copies that are waited for.

    Args:
        blocks: in the order in which they are expected first.
        rest: a block -> where its tensors rest, with the same values.
        transfer: copies.
    """

    def __init__(self, blocks: list[Block], rest: Callable[[Block], list[Tensor]], transfer: Transfer) -> None:
        self.blocks = blocks
        self.transfer = transfer
        self.of = {name: index for index, block in enumerate(blocks) for name in block.tensors}
        self.waiting: dict[str, Callable[[], None]] = {}  # steps that are not written yet, by tensor
        # guessed to be in order; what really comes next is learnt as forwards go by
        self._next = {index: (index + 1) % len(blocks) for index in range(len(blocks))}
        self._last: int | None = None
        # one size for all buffers: any block fits into any of them
        self._size = max((block.num_bytes for block in blocks), default=0)
        self._free: list[Tensor] = []
        self._going: list[Any] = []  # copies down that the host has not waited for
        for block in blocks:
            _point(block, rest(block))

    # ---- a forward enters and leaves ---------------------------------------------------------------------------------

    def enter(self, index: int, count: int = 1) -> None:
        """``count`` forwards begin with a block; its weights are on the device and up to date afterwards."""
        block = self.blocks[index]
        block.inside += count
        with torch._C.DisableTorchFunction():  # no read of the model's
            # the copy has usually begun when the block before was entered; then this only waits
            self._bring(index)
            self._make_ready(block)
            if self._last is not None:
                self._next[self._last] = index
            self._last = index
            # blocks that no forward is in: put away now, free for the one that is brought next
            for other in self.blocks:
                if other.lease is not None and not other.inside and other is not block and other.ticket is None:
                    self._put_away(other)
            if self._next[index] > index:  # a new pass may never begin
                self._bring(self._next[index])

    def leave(self, index: int) -> None:
        """A forward leaves a block, which stays on the device until its memory is wanted."""
        self.blocks[index].inside -= 1

    def rest(self) -> None:
        """No forward is in any block: what was on its way is forgotten, and all weights are where they rest."""
        for block in self.blocks:
            block.inside = 0  # also those of a forward that something has ended
            if block.ticket is not None:
                assert block.lease is not None
                self._free.append(block.lease.buffer)  # a copy into it that is still under way comes before the next
                block.lease = block.ticket = None
            elif block.lease is not None:
                self._put_away(block)
        self._last = None
        self.transfer.drain(self._going)
        self._going.clear()

    def keep(self, name: str) -> None:
        """A tensor stays on the device from now on: something reads it while its block is elsewhere."""
        index = self.of[name]
        self.settle()
        block = self.blocks[index]
        tensor = block.tensors.pop(name)
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            # a copy of its own: what rests in a file stays there as it was
            tensor.data = tensor.data.to(self.transfer.device, copy=True)
        del self.of[name]

    # ---- steps -------------------------------------------------------------------------------------------------------

    def write(self, name: str, step: Callable[[], None], *, now: bool) -> None:
        """Write a step into a tensor: at the next visit of its block, or ``now``, which brings it."""
        # what stands outside of the blocks is on the device all the time
        if name not in self.of:
            step()
            return
        block = self.blocks[self.of[name]]
        if name in self.waiting:  # two steps and no visit between them: they are written in their order
            self._bring(self.of[name])
            self._make_ready(block)
        self.waiting[name] = step
        if now:
            self._bring(self.of[name])
            self._make_ready(block)
            self._write_waiting(block)

    def settle(self) -> None:
        """All steps are written, and all weights rest: what reads or writes them from outside may do so now."""
        self.rest()
        for index, block in enumerate(self.blocks):
            if not self.waiting.keys().isdisjoint(block.tensors):
                self._bring(index)
                self._make_ready(block)
                self._put_away(block)
        self.rest()

    # ---- one block ---------------------------------------------------------------------------------------------------

    def _bring(self, index: int) -> None:
        """Begin to copy a block to the device, where it is not there yet."""
        block = self.blocks[index]
        if block.lease is not None:
            return
        # two buffers are made in the end: one block computes while the next one comes
        buffer = self._free.pop() if self._free else self.transfer.buffer(self._size)
        # where the values rest now is where they go back to
        block.resting = {name: tensor.data for name, tensor in block.tensors.items()}
        resting = list(block.resting.values())
        block.lease = Lease(buffer, resting)
        # .data is exchanged, so that hooks and optimizers keep the parameter they know
        pairs = list(zip(resting, block.lease.tensors, strict=True))
        block.ticket = self.transfer.up(pairs, lambda: _release(resting))

    def _make_ready(self, block: Block) -> None:
        assert block.lease is not None
        if block.ticket is not None:
            self.transfer.wait(block.ticket)
            _point(block, block.lease.tensors)
            block.ticket = None
        self._write_waiting(block)

    def _write_waiting(self, block: Block) -> None:
        steps = {name: self.waiting.pop(name) for name in block.tensors if name in self.waiting}
        if not steps:
            return
        # only what moved is copied back; the rest is as it was where it rests
        block.moved |= steps.keys()
        device = self.transfer.device.type
        # not under the query's autocast or inference mode: a step is written in float32
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            for step in steps.values():
                step()

    def _put_away(self, block: Block) -> None:
        """The block's memory is free for another one; what has moved is copied back first."""
        assert block.lease is not None
        leased = dict(zip(block.tensors, block.lease.tensors, strict=True))
        if block.moved:
            pairs = [(leased[name], block.resting[name]) for name in block.tensors if name in block.moved]
            self._going.append(self.transfer.down(pairs, lambda: _release([resting for _, resting in pairs])))
        _point(block, block.resting.values())
        self._free.append(block.lease.buffer)
        block.lease = None
        block.moved.clear()


def _point(block: Block, tensors: Iterable[Tensor]) -> None:
    """Let the block's parameters have these tensors as their values."""
    with torch._C.DisableTorchFunction():
        for parameter, tensor in zip(block.tensors.values(), tensors, strict=True):
            parameter.data = tensor


def _release(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        release(tensor)


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of any model: the members of its outermost lists of modules, else what holds tensors.

    What several of them hold, and what stands outside, is in none.

    Example:
        >>> import torch
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
        >>> list(blocks_of(torch.nn.ModuleDict({"layers": layers}))[0].tensors)
        ['layers.0.weight', 'layers.0.bias']
    """
    members = _members(model)
    # a model without lists of layers is cut at every module with tensors of its own
    modules = members or [module for module in model.modules() if module._parameters]
    place: dict[nn.Module, int] = {}  # module -> its block, -1 for one of several
    for index, member in enumerate(modules):
        for module in member.modules() if members else [member]:
            place[module] = index if module not in place else -1
    # a tied tensor is held by several blocks, and rests in none of them
    held: dict[int, set[int]] = {}  # parameter -> the blocks that hold it
    for module in model.modules():
        for parameter in module._parameters.values():
            held.setdefault(id(parameter), set()).add(place.get(module, -1))
    blocks = [Block(module, {}) for module in modules]
    for name, parameter in model.named_parameters():
        (index, *others) = held[id(parameter)]
        if not others and index >= 0 and parameter.numel():
            blocks[index].tensors[name] = parameter
    return [block for block in blocks if block.tensors]


def _members(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, torch.nn.ModuleList) and len(module) > 1:
        return list(module)
    return [member for child in module.children() for member in _members(child)]
