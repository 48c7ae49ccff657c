"""Perturb each module only while it computes, in memory of its own: the weights are read and never written."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any

from zoft.engines._away import device_of
from zoft.engines._lockstep import Lockstep
from zoft.engines._pieces import LinearCall, Reads, asks_no_values, watching
from zoft.engines._reads import unwatched, watched
from zoft.engines._scratch import Lease, Scratch
from zoft.engines._step_prefix import StepPrefix
from zoft.engines.base import Engine, Objective, Session, memory_errors_say, of_example, refuse_derivatives
from zoft.estimators.base import Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

log = logging.getLogger(__name__)

_EVERY = 50  # calls of losses from one look at a compiled model's reads to the next


@dataclass
class Layerwise(Engine):
    """Weights are never written during a query, so they come back bit for bit in every dtype.

    A module's perturbed tensors exist only while its own forward runs. The points of one direction go through the model
    side by side (as long as no activation is larger than ``piece_mb``), so that z is made once for all of them: extra
    memory is one copy of the largest module for each, and of a large matrix only a part (``piece_mb``): of an embedding
    the rows in use, of a linear layer some of its outputs at a time.

    A tensor that is also read outside its module's forward (some attention layers and tied output heads do that), or
    whose module is never called, is perturbed for the whole forward instead: that much more memory for each. All calls
    of torch functions are looked at during the first ``losses`` of a session to find these tensors (a compiled model
    runs uncompiled for it); if there are any they are named once and the points are computed again. Later on only the
    calls that get a trained tensor are looked at (where torch has compiled something, one forward in fifty): a read
    that a later batch causes is found too, and its points are computed again. Not seen: a later read of torch's own
    attention modules, one in another thread or inside scripted code, and a view that was taken before the query (a
    view does not follow its parameter's swapped storage).

    Args:
        piece_mb: matrices larger than this are perturbed in pieces of this size, in MiB; 0 chooses by device (16 on a
            CPU, where it should stay in the cache and still be worth a product, and 256 on a GPU).
    """

    piece_mb: int = 0

    def check(self) -> None:
        """Refuse a negative size."""
        self.require(self.piece_mb >= 0, "piece_mb", "at least 0")

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """Hooks are set only while losses are computed."""
        return LayerwiseSession(model, coordinates, objective, self.piece_mb)


@dataclass
class Side:
    """One forward in progress."""

    point: Point = field(default_factory=Point)
    clean: dict[str, Tensor] = field(default_factory=dict)  # name -> storage of a tensor that is swapped right now
    mine: dict[str, Tensor] = field(default_factory=dict)  # name -> what it is swapped for
    depth: Counter[str] = field(default_factory=Counter)  # a tied tensor can be inside two forwards at once
    entered: set[str] = field(default_factory=set)  # tensors whose modules have run or are running
    entered_since: set[str] = field(default_factory=set)  # the same, since the model was called
    visits: Counter[Any] = field(default_factory=Counter)  # how often each module was entered
    modes: list[Any] = field(default_factory=list)  # contexts that are open
    undo: dict[int, list[list[Callable[[Any], None]]]] = field(default_factory=dict)  # what leaving a module does


class LayerwiseSession(Session):
    """The hooks, and the forwards that run side by side."""

    name = "layerwise"

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, piece_mb: int = 0) -> None:
        super().__init__(model, coordinates, objective)
        device = device_of(self, next(iter(self.weights.tensors)))
        self.piece_bytes = (piece_mb or (16 if device.type == "cpu" else 256)) << 20
        self.together = Lockstep()
        self.scratch = Scratch()
        self._side = Side()
        self._compiled = False
        self._global_state: Any = None
        self._side_by_side = True
        self._told = False
        self._too_large = 0  # bytes of an activation that keeps forwards apart
        self._sets_global_state = False  # the objective: what it sets would be set for the other forwards too
        self._largest_output = 0  # bytes: of a module that holds trained weights, in the last call of losses
        self._names = {id(tensor): name for name, tensor in self.weights.tensors.items()}
        self._num_calls = 0  # where graphs exist
        self._watchable = _watchable(model, self.weights.tensors.values())
        self._read_outside: set[str] = set()
        self._whole_forward: list[str] | None = None  # tensors read outside their module's forward; None: not known yet

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The objective at each point (see the base class)."""
        return torch.stack(self._asked([(batch, point) for point in points]))

    def losses_per_example(
        self, examples: Sequence[Any], points: Sequence[Point], numbers: Sequence[int] | None = None
    ) -> Tensor:
        """The objective of each example along its own directions; examples go through the model side by side too."""
        numbered = zip(examples, range(len(examples)) if numbers is None else numbers, strict=True)
        pairs = [(one, of_example(point, number)) for one, number in numbered for point in points]
        return torch.stack(self._asked(pairs)).view(len(examples), len(points)).T

    def _asked(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        refuse_derivatives([point for _, point in pairs], self.name)
        self._compiled = _is_compiled(self.model)
        small = self._largest_output <= self.piece_bytes  # as the queries before have seen it
        self._too_large = 0 if small else self._largest_output
        self._side_by_side = small and not self._whole_forward and not self._compiled and not self._sets_global_state
        self._largest_output = 0
        with memory_errors_say(self.what_to_lower()), self._hooks(), self._no_graph():
            if self._whole_forward is None:
                return self._losses(pairs)
            with self._watched_later(pairs[0]):
                results = self._losses(pairs)
                if self._find_new_reads():
                    results = self._losses(pairs)
            return results

    @contextmanager
    def _watched_later(self, pair: tuple[Any, Point]) -> Iterator[None]:
        """Queries after the first ones: a read that the hooks do not cover is noted, at the price of a call a use.

        Where torch has compiled something, its graphs would be made anew for it: one forward in fifty runs uncompiled.
        """
        if not (self._compiled or _graphs_exist()):
            with watched(self._watchable, self._note):
                yield
            return
        self._num_calls += 1
        if self._num_calls % _EVERY == 0:
            with self._watch():
                self._loss_at(*pair)
        yield

    @contextmanager
    def _no_graph(self) -> Iterator[None]:
        """Inference mode; in the first queries only no gradients (see :meth:`Session.evaluate`).

        A graph that torch compiled before the hooks were there does not call them. It is not used inside an overriding
        context, which is one of the things that a graph depends on.
        """
        graphs = self._compiled or _graphs_exist()  # looking at every torch function takes time, too
        apart = watching(lambda func, args, kwargs: func(*args, **kwargs)) if graphs else nullcontext()
        with apart, torch.no_grad() if self._whole_forward is None else torch.inference_mode():
            yield

    def what_to_lower(self) -> str:
        """The setting of this engine that bounds its memory, for somebody who ran out of it."""
        return f"engine.piece_mb (now {self.piece_bytes >> 20})"

    def _losses(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        if self._whole_forward is None:
            results = [self._loss_at(batch, point) for batch, point in pairs]
            if not self._find_read_outside():
                return results
        results, points = [], [point for _, point in pairs]
        same_batch = all(batch is pairs[0][0] for batch, _ in pairs)
        # Once here, for all: coroutines that each entered and left it would do so in turns, and leave it on.
        with torch.inference_mode(), self._prefix_reused(points) if same_batch else nullcontext():
            waiting = iter(pairs)
            for group in self.groups(points):
                together = islice(waiting, len(group))
                results += self.together.run([partial(self._loss_at, batch, point) for batch, point in together])
        return results

    @contextmanager
    def _prefix_reused(self, points: Sequence[Point]) -> Iterator[None]:
        """Where these points move some blocks only, the layers below them run once."""
        directions = {point.direction for point in points if point.direction is not None}
        moving = {n for n in self.weights.tensors if any(self.coordinates.moves(d, n) for d in directions)}
        if len(moving) == len(self.weights.tensors) or self._whole_forward or self._compiled:
            yield
            return
        owners = {module for module, held in self.weights.owners.items() if any(name in moving for _, name in held)}
        prefix = StepPrefix(
            self.model,
            lambda: self._side.visits,
            lambda: self._side.entered_since.clear(),
            lambda: not moving.isdisjoint(self._side.entered_since),
        )
        with prefix.reused(owners):
            yield

    def groups(self, points: Sequence[Point]) -> Iterator[list[Point]]:
        """Points that go through the model side by side: those along one direction whose z is not kept anyway.

        A forward that waits keeps its activations. Where one of them is larger than the scratch, making z again costs
        little beside the forward, and the memory counts.
        """
        if self._too_large and not self._told:
            self._told = True
            log.info(
                "engine=%s: an activation takes %d MiB, more than engine.piece_mb=%d: points go one after the other, "
                "to keep within the memory of a forward, and z is made for each",
                *(self.name, self._too_large >> 20, self.piece_bytes >> 20),
            )
        for direction, group in groupby(points, key=lambda point: point.direction):
            members = list(group)
            if direction is None or self.coordinates.keeps or not self._side_by_side:
                yield from ([member] for member in members)
            else:
                yield members

    # ---- one forward -------------------------------------------------------------------------------------------------

    def _loss_at(self, batch: Any, point: Point) -> Tensor:
        side = self._side = Side(point)
        try:
            if self._whole_forward and point.direction is not None:
                moving = [n for n in self._whole_forward if self.coordinates.moves(point.direction, n)]
                if moving:
                    self._swap(side, moving)
                side.depth.update(self._whole_forward)
            self._global_state = _global_state() if self._whole_forward is None else None
            with self._watch() if self._whole_forward is None else nullcontext():
                return self.evaluate(batch)
        finally:  # torch calls no hook of a forward that a signal ends
            for name, clean in side.clean.items():
                self.weights.tensors[name].data = clean
            while side.modes:
                side.modes.pop().__exit__(None, None, None)

    def _enter(self, module: nn.Module, names: list[str]) -> None:
        side = self._side
        if self._whole_forward is None and _global_state() != self._global_state:
            self._sets_global_state = True
        side.entered.update(names)
        side.entered_since.update(names)
        side.visits[id(module)] += 1
        undo: list[Callable[[Any], None]] = [lambda _: side.depth.subtract(names)]
        side.undo.setdefault(id(module), []).append(undo)
        direction = side.point.direction
        fresh = [n for n in names if direction and not side.depth[n] and self.coordinates.moves(direction, n)]
        side.depth.update(names)
        pieces = [name for name in fresh if self._in_pieces(module, name)]
        if pieces:
            mode = Reads(self, {name: self.weights.tensors[name] for name in pieces}, self._visit(module)).mode()
            mode.__enter__()
            side.modes.append(mode)
            undo.append(lambda _: side.modes.pop().__exit__(None, None, None))
        whole = [name for name in fresh if name not in pieces]
        if whole:
            lease = self._swap(side, whole, self._visit(module))
            undo.append(lambda output: self._swap_back(side, whole, lease, output))

    def _leave(self, module: nn.Module, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._see(output)
        visits = self._side.undo.get(id(module), [])
        for undo in reversed(visits.pop() if visits else []):
            undo(output)

    def _see(self, output: Tensor) -> None:
        """Note how large a forward is."""
        self._largest_output = max(self._largest_output, output.numel() * output.element_size())

    def _visit(self, module: nn.Module) -> tuple[int, int]:
        return id(module), self._side.visits[id(module)]

    def _swap(self, side: Side, names: list[str], place: Any = None) -> Lease:
        """Replace the storage of some tensors by perturbed ones."""
        like = [self.weights.tensors[name].data for name in names]
        lease: Lease = self.meet(("whole", place), side.point, lambda points: self._perturbed(names, like, points))
        for name, clean, mine in zip(names, like, lease.tensors, strict=True):
            side.clean[name], side.mine[name] = clean, mine
            self.weights.tensors[name].data = mine
        return lease

    def _perturbed(self, names: list[str], like: list[Tensor], points: list[Point]) -> list[Lease]:
        leases = [self.scratch.lease(like) for _ in points]
        for index, name in enumerate(names):
            self.perturb(name, 0, points, [lease.tensors[index].view(-1) for lease in leases])
        return leases

    def perturb(self, name: str, start: int, points: Sequence[Point], outs: Sequence[Tensor]) -> None:
        """``outs[i]`` = the flat piece from ``start`` on of tensor ``name`` at ``points[i]``; z once a direction."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept of z is used outside of this query too
            for direction in dict.fromkeys(point.direction for point in points):
                same = [i for i, point in enumerate(points) if point.direction == direction]
                assert direction is not None
                self.coordinates.perturb(
                    direction, name, start, [points[i].scale for i in same], [outs[i] for i in same]
                )

    def linears(self, name: str, weight: Tensor, brought: Sequence[LinearCall]) -> list[Tensor] | None:
        """Another way to compute a perturbed linear layer for several forwards, where this engine has one."""
        del name, weight, brought
        return None

    def _swap_back(self, side: Side, names: list[str], lease: Lease, output: Any) -> None:
        for name in names:
            self.weights.tensors[name].data = side.clean[name]
            del side.clean[name], side.mine[name]  # after the assignment: whatever interrupts, nothing is lost
        if not lease.appears_in(output):
            self.scratch.give_back(lease)

    def meet(self, place: Any, brought: Any, work: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """:meth:`Lockstep.meet`; while this forward waits, the weights are clean for the others."""
        side = self._side
        for name, clean in side.clean.items():
            self.weights.tensors[name].data = clean
        answer = self.together.meet(place, brought, partial(_unwatched, work))
        self._side = side
        for name, mine in side.mine.items():
            self.weights.tensors[name].data = mine
        return answer

    @property
    def point(self) -> Point:
        """Where the running forward is."""
        return self._side.point

    def _in_pieces(self, module: nn.Module, name: str) -> bool:
        tensor = self.weights.tensors[name]
        large = tensor.dim() == 2 and tensor.numel() * tensor.element_size() > self.piece_bytes
        return (
            large
            and isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
            and getattr(module, "max_norm", None) is None
            and not self._compiled
        )

    # ---- hooks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for module, held in self.weights.owners.items():
                names = [name for _, name in held]
                enter = _uncompiled(lambda m, _i, names=names: self._enter(m, names))
                leave = _uncompiled(lambda m, _i, output: self._leave(m, output))
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- reads that the hooks do not cover ---------------------------------------------------------------------------

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Within this block, a trained tensor handed to torch while none of its modules runs is noted."""
        # a compiled graph would call no torch function
        with (
            torch.compiler.set_stance("force_eager") if _may_be_compiled() else nullcontext(),
            watching(self._call_noted),
        ):
            yield

    def _call_noted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not asks_no_values(func, result):
            self._note([*args, *kwargs.values()])
        return result

    def _note(self, value: Any) -> None:
        """A trained tensor that torch is handed while none of its modules runs."""
        if isinstance(value, (tuple, list)):
            for item in value:
                self._note(item)
        else:
            name = self._names.get(id(value))
            if name is not None and not self._side.depth[name]:
                self._read_outside.add(name)

    def _find_new_reads(self) -> bool:
        """After later queries: has this batch made the model read a tensor outside that no batch before did?"""
        assert self._whole_forward is not None
        new = sorted(self._read_outside - set(self._whole_forward))
        if not new:
            return False
        log.warning(
            "engine=%s: from this step on %d more trainable tensors are perturbed for the whole forward, which reads "
            "them outside their own module's for some batches (%s)",
            *(self.name, len(new), ", ".join(new[:5]) + (" ..." if len(new) > 5 else "")),
        )
        self._whole_forward += new
        self._side_by_side = False
        return True

    def _find_read_outside(self) -> bool:
        """After the first queries: are there tensors that perturbing their own modules' forwards does not cover?"""
        self._whole_forward = [
            name for name in self.weights.tensors if name in self._read_outside or name not in self._side.entered
        ]
        if self._whole_forward:
            names = ", ".join(self._whole_forward[:5]) + (" ..." if len(self._whole_forward) > 5 else "")
            log.warning(
                "engine=%s: %d trainable tensors are read outside their own module's forward, or not reached by "
                "it (%s); they are perturbed for the whole forward instead. If the objective never uses them they only "
                "move at random: exclude them with trainable=regex.",
                *(self.name, len(self._whole_forward), names),
            )
        self._name_shared_modules()
        if self._sets_global_state:
            log.warning(
                "engine=%s: the objective draws random numbers or chooses attention kernels while the model runs: its "
                "queries go one after the other, and z is made for each",
                self.name,
            )
        return bool(self._whole_forward)

    def _name_shared_modules(self) -> None:
        """A module that runs several times a forward moves once, and costs its z each time."""
        runs = {module: self._side.visits[id(module)] for module in self.weights.owners}
        once = min((count for count in runs.values() if count), default=0)  # or once for every micro-batch
        shared = [held[0][1] for module, held in self.weights.owners.items() if runs[module] > once]
        if shared:
            names = ", ".join(shared[:5]) + (" ..." if len(shared) > 5 else "")
            log.warning(
                "engine=%s: %d modules run more than once in a forward (the one with %s): their weights move once, "
                "together, and their directions are made each time",
                *(self.name, len(shared), names),
            )


def _watchable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """All but those of torch's own attention, which computes in another way where a tensor is watched."""
    own = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
    theirs = {id(p) for module in model.modules() if isinstance(module, own) for p in module.parameters()}
    return [parameter for parameter in parameters if id(parameter) not in theirs]


def _unwatched(work: Callable[[list[Any]], Sequence[Any]], brought: list[Any]) -> Sequence[Any]:
    """What the engine itself does with the weights is no read of the model's."""
    with unwatched():
        return work(brought)


def _global_state() -> Any:
    """What a forward may set for the whole process: the random state, and which attention kernels may be used."""
    cuda = torch.backends.cuda
    kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    return *kernels, torch.get_rng_state().numpy().tobytes()


def _may_be_compiled() -> bool:
    return "torch._dynamo" in sys.modules  # torch.compile imports it; importing it for nothing takes seconds


def _graphs_exist() -> bool:
    """Whether torch has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and bool(dynamo.utils.counters["stats"])


def _is_compiled(model: nn.Module) -> bool:
    """Whether some module runs compiled code, which no forward may leave halfway."""
    return _may_be_compiled() and any(
        module._compiled_call_impl is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile does not trace: it would compile it again for every module, up to its limit."""
    return torch.compiler.disable(hook) if _may_be_compiled() else hook
