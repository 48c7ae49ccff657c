"""A module's tensors at another point while its own forward runs: swapped on the way in, and back on the way out.

What they are swapped for lives in memory that one module after the other uses (:class:`Scratch`).
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zoft.engines._lockstep import Lockstep
from zoft.engines._pieces import LinearCall, Reads
from zoft.engines._step_prefix import PrefixState
from zoft.estimators.base import Point
from zoft.noise.direction import Direction
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

_ALIGN = 64  # bytes: a view begins where vector instructions like it


@dataclass
class Visit:
    """One entry into a module: what has to be undone when it is left."""

    swapped: list[str] = field(default_factory=list)  # names of its tensors that were swapped on the way in
    lease: Lease | None = None  # the memory of what they were swapped for
    mode: Any = None  # the context in which its large tensors are read in pieces


@dataclass
class ForwardState:
    """One forward in progress.

    Args:
        point: where in the weights' space it is.
        moving: tensors that are perturbed there.
        clean: name -> storage of a tensor that is swapped right now.
        perturbed: name -> what it is swapped for.
        depth: name -> how many of the modules that hold it run; a tied tensor can be inside two at once.
        entered: tensors whose modules have run or are running.
        entered_since: the same, since the model was called.
        visits: how often each module was entered.
        prefix: how far it has come below the blocks that move.
        modes: contexts that are open.
        running: modules that have been entered and not left, with each visit: a module may be inside itself.
    """

    point: Point = field(default_factory=Point)
    moving: set[str] = field(default_factory=set)
    clean: dict[str, Tensor] = field(default_factory=dict)
    perturbed: dict[str, Tensor] = field(default_factory=dict)
    depth: Counter[str] = field(default_factory=Counter)
    entered: set[str] = field(default_factory=set)
    entered_since: set[str] = field(default_factory=set)
    visits: Counter[Any] = field(default_factory=Counter)
    prefix: PrefixState = field(default_factory=PrefixState)
    modes: list[Any] = field(default_factory=list)
    running: dict[nn.Module, list[Visit]] = field(default_factory=dict)


class Swapper:
    """Gives modules W + scale * z to compute with, for the forwards that run side by side.

    Args:
        coordinates: the subspace bound to the weights.
        piece_bytes: matrices larger than this are perturbed in pieces of this size.
    """

    def __init__(self, coordinates: BoundSubspace, piece_bytes: int) -> None:
        self.coordinates = coordinates
        self.weights = coordinates.weights
        self.piece_bytes = piece_bytes
        self.lockstep = Lockstep()
        self.scratch = Scratch()
        self.state = ForwardState()
        self.compiled = False  # the model: a large matrix cannot be read in pieces there
        self.unseen: Any = torch._C.DisableTorchFunctionSubclass  # context in which the engine reads for itself
        self.largest_output = 0  # bytes: of a module that holds trained weights, in the last call of losses
        self._names = {module: [name for _, name in held] for module, held in self.weights.owners.items()}
        self.watched: dict[str, type] = {}  # name -> class by which a read outside of the tensor's module is noticed

    @property
    def point(self) -> Point:
        """Where the running forward is."""
        return self.state.point

    # ---- one forward -------------------------------------------------------------------------------------------------

    @contextmanager
    def forward(self, point: Point, whole_forward: Sequence[str]) -> Iterator[ForwardState]:
        """Within this block the objective is evaluated at a point; afterwards nothing is swapped.

        Args:
            point: where.
            whole_forward: tensors that are perturbed all along, since their own module's forward does not cover them.
        """
        # a new state: what an interrupted forward left cannot be taken for this one's
        state = self.state = ForwardState(point)
        try:
            if point.direction is not None:
                state.moving = self.coordinates.moving(point.direction)
                by_device: dict[torch.device, list[str]] = {}  # a lease is of one device
                for name in whole_forward:
                    if name in state.moving:
                        by_device.setdefault(self.weights.tensors[name].device, []).append(name)
                # perturbed before the first module runs: they are read somewhere outside of their own
                for names in by_device.values():
                    self._swap(state, names)
                # counted as entered, so that their own module does not perturb them once more
                state.depth.update(whole_forward)
            yield state
        finally:  # torch calls no hook of a forward that a signal ends
            # clean storage first: whatever was raised, the weights are what they were
            for name, clean in state.clean.items():
                self.weights.tensors[name].data = clean
            while state.modes:
                state.modes.pop().__exit__(None, None, None)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within this block modules that hold trained tensors call :meth:`_enter` and :meth:`_leave`."""
        enter, leave = uncompiled(self._enter), uncompiled(self._leave)
        with ExitStack() as hooks:
            for module in self.weights.owners:
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
            yield

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        state, names = self.state, self._names[module]
        # What a module does with its own tensors is no read outside of it, and a watched one costs a call each time.
        if self.watched:
            self._look_away(names)
        state.entered.update(names)
        state.entered_since.update(names)
        state.visits[id(module)] += 1
        visit = Visit()
        state.running.setdefault(module, []).append(visit)
        whole: list[str] = []
        pieces: dict[str, Tensor] = {}
        for name in names:
            # a tied tensor that another running module has swapped already is not moved twice
            if name in state.moving and not state.depth[name]:
                if self.in_pieces(module, name):
                    pieces[name] = self.weights.tensors[name]
                else:
                    whole.append(name)
        state.depth.update(names)
        number = id(module), state.visits[id(module)]
        if pieces:
            visit.mode = Reads(self, pieces, number).mode()
            visit.mode.__enter__()
            state.modes.append(visit.mode)
        if whole:
            visit.lease = self._swap(state, whole, number)
            visit.swapped = whole

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.see(output)
        state, names = self.state, self._names[module]
        visits = state.running.get(module)
        if visits:
            visit = visits.pop()
            # in the reverse order of entering: the mode was opened before the tensors were swapped
            for name in visit.swapped:
                self.weights.tensors[name].data = state.clean[name]
                del state.clean[name], state.perturbed[name]  # only now: whatever interrupts, nothing is lost
            # a module that hands out a view of its weights (an embedding's own) still needs the memory
            if visit.lease is not None and not visit.lease.appears_in(output):
                self.scratch.give_back(visit.lease)
            if visit.mode is not None:
                state.modes.pop().__exit__(None, None, None)
            state.depth.subtract(names)
        # the module has read what is its own; from here on a read is one from outside
        for name in names if self.watched else ():
            if name in self.watched and not state.depth[name]:
                self.weights.tensors[name].__class__ = self.watched[name]

    def see(self, output: Tensor) -> None:
        """Remember the size of the largest output."""
        self.largest_output = max(self.largest_output, output.numel() * output.element_size())

    def _look_away(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.watched:
                self.weights.tensors[name].__class__ = torch.nn.Parameter

    # ---- storage -----------------------------------------------------------------------------------------------------

    def _swap(self, state: ForwardState, names: list[str], visit: Any = None) -> Lease:
        """Replace the storage of some tensors by perturbed ones."""
        # points side by side come here together: z is made once for all of them
        like = [self.weights.tensors[name].data for name in names]
        lease: Lease = self.sync(("whole", visit), state.point, partial(self._perturbed, names, like))
        if self.watched:  # another forward may have left the module meanwhile
            self._look_away(names)
        for name, clean, perturbed in zip(names, like, lease.tensors, strict=True):
            # .data: modules, optimizers and ties keep the parameter they hold
            state.clean[name], state.perturbed[name] = clean, perturbed
            self.weights.tensors[name].data = perturbed
        return lease

    def sync(self, key: Any, item: Any, batch_fn: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """:meth:`Lockstep.sync`; while this forward waits, the weights are clean for the others."""
        state = self.state
        # the other forwards run meanwhile, and each swaps for itself
        for name, clean in state.clean.items():
            self.weights.tensors[name].data = clean

        def unseen(items: list[Any]) -> Sequence[Any]:
            with self.unseen():  # what the engine itself reads is no read of the model's
                return batch_fn(items)

        answer = self.lockstep.sync(key, item, unseen) if self.lockstep.is_running else unseen([item])[0]
        # whichever forward ran last has left its own state here
        self.state = state
        if self.watched:
            self._look_away(list(state.perturbed))
        # and its own perturbed tensors back in place
        for name, perturbed in state.perturbed.items():
            self.weights.tensors[name].data = perturbed
        return answer

    def _perturbed(self, names: list[str], like: list[Tensor], points: list[Point]) -> list[Lease]:
        leases = [self.scratch.lease(like) for _ in points]
        for index, name in enumerate(names):
            # the same elements of all points at once
            self.perturb(name, 0, points, [lease.tensors[index].view(-1) for lease in leases])
        return leases

    def perturb(self, name: str, start: int, points: Sequence[Point], outs: Sequence[Tensor]) -> None:
        """``outs[i]`` = the flat piece from ``start`` on of tensor ``name`` at ``points[i]``; z once a direction."""
        along: dict[Direction, tuple[list[float], list[Tensor]]] = {}
        for point, out in zip(points, outs, strict=True):
            assert point.direction is not None
            scales, same = along.setdefault(point.direction, ([], []))
            scales.append(point.scale)
            same.append(out)
        with torch.inference_mode(False), torch.no_grad():  # what is kept of z is used outside of this query too
            for direction, (scales, same) in along.items():
                # outs[i] = W + s_i z: the same z for every point along this direction
                self.coordinates.perturb(direction, name, start, scales, same)

    # ---- large matrices ----------------------------------------------------------------------------------------------

    def in_pieces(self, module: nn.Module, name: str) -> bool:
        """Whether a tensor is perturbed in pieces, as it is read (:class:`zoft.engines._pieces.Reads`)."""
        tensor = self.weights.tensors[name]
        large = tensor.dim() == 2 and tensor.numel() * tensor.element_size() > self.piece_bytes
        return (
            large
            and isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
            # embedding with max_norm writes into its matrix; compiled code reads it whole
            and getattr(module, "max_norm", None) is None
            and not self.compiled
        )

    def linears(self, name: str, weight: Tensor, calls: Sequence[LinearCall]) -> list[Tensor] | None:
        """Another way to compute a perturbed linear layer for several forwards, where this engine has one."""
        del name, weight, calls
        return None


def may_be_compiled() -> bool:
    """Whether anything in this process can be compiled code of torch."""
    return "torch._dynamo" in sys.modules  # torch.compile imports it; importing it for nothing takes seconds


def uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile does not trace: it would compile it again for every module, up to its limit."""
    return torch.compiler.disable(hook) if may_be_compiled() else hook


# ---- memory ----------------------------------------------------------------------------------------------------------


class Lease:
    """Some tensors side by side in one buffer, for a while.

    Args:
        buffer: bytes.
        like: tensors whose shapes and dtypes the leased ones have.
    """

    def __init__(self, buffer: Tensor, like: Sequence[Tensor]) -> None:
        self.buffer = buffer
        self.tensors: list[Tensor] = []
        start = 0
        with torch.inference_mode(False):  # as normal tensors they may be written and swapped in anywhere
            for tensor in like:
                stop = start + tensor.numel() * tensor.element_size()
                # the same bytes read as another dtype: nothing is copied
                self.tensors.append(buffer[start:stop].view(tensor.dtype).view(tensor.shape))
                start = aligned(stop)

    def appears_in(self, values: object) -> bool:
        """Whether a tensor in ``values`` (also inside tuples, lists, dicts) is a view of this memory."""
        if isinstance(values, torch.Tensor):
            # the same storage, whatever view of it an output is
            return values.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()
        if isinstance(values, dict):
            return any(map(self.appears_in, values.values()))
        return isinstance(values, (tuple, list)) and any(map(self.appears_in, values))


class Scratch:
    """Buffers that are kept between queries, no more of them and none larger than a query has needed.

    New memory for every module would cost as much as filling it: the system hands it out page by page, zeroed.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}  # the smallest buffer first

    def lease(self, like: Sequence[Tensor]) -> Lease:
        """Memory for tensors of these shapes and dtypes, on the first one's device; its contents are arbitrary."""
        size = sum(aligned(tensor.numel() * tensor.element_size()) for tensor in like)
        free = self._free.setdefault(like[0].device, [])
        # best fit: a large buffer is left for a large module
        at = bisect_left(free, size, key=torch.Tensor.numel)
        if at < len(free):
            return Lease(free.pop(at), like)
        if free:
            # a larger buffer takes the place of the largest: in time all of them fit the largest module
            free.pop()
        with torch.inference_mode(False):
            return Lease(torch.empty(size, dtype=torch.uint8, device=like[0].device), like)

    def give_back(self, lease: Lease) -> None:
        """The lease's tensors must not be used any more."""
        insort(self._free[lease.buffer.device], lease.buffer, key=torch.Tensor.numel)


def aligned(size: int) -> int:
    """The bytes that a tensor of ``size`` bytes takes in a buffer."""
    return -(-size // _ALIGN) * _ALIGN
