"""Read-only weights: each module computes with W + s z in a scratch that lives as long as its forward."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.engines.base import Engine, Objective, Session, refuse_derivatives
from zoft.estimators.base import Point
from zoft.lazy import torch
from zoft.subspaces.base import Coordinates
from zoft.weights import perturbed

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass
class Layerwise(Engine):
    """Weights are never written during a query, so they come back bit for bit in every dtype.

    A module's perturbed tensors exist only while its own forward runs: extra memory is the largest module, and up to
    64 MiB of directions kept for the step (``zoft.subspaces.base``). A tensor that is also read outside its module's
    forward (some attention layers and tied output heads do that), or whose module is never called, is perturbed for
    the whole forward instead: that much more memory for each. All calls of torch functions are looked at during the
    first ``losses`` of a session to find these tensors (a compiled model runs uncompiled for it); if there are any
    they are named once and the points are computed again. Not seen: a read that only later batches cause, one in
    another thread or inside scripted code, and a view that was taken before the query (a view does not follow its
    parameter's swapped storage).
    """

    def bind(self, model: nn.Module, coordinates: Coordinates, objective: Objective) -> Session:
        """Hooks are set only while losses are computed."""
        return _LayerwiseSession(model, coordinates, objective)


class _LayerwiseSession(Session):
    def __init__(self, model: nn.Module, coordinates: Coordinates, objective: Objective) -> None:
        super().__init__(model, coordinates, objective)
        self._clean: dict[str, Tensor] = {}  # name -> the untouched storage of a tensor that is swapped right now
        self._depth: dict[str, int] = {}  # a tied tensor can be inside two forwards at once
        self._visited: set[str] = set()
        self._read_outside: set[str] = set()
        self._whole_forward: list[str] | None = None  # tensors read outside their module's forward; None: not known yet
        self._point = Point()

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "layerwise")
        with self._hooks():
            results = [self._loss_at(batch, point) for point in points]
            if self._whole_forward is None and self._find_read_outside():
                results = [self._loss_at(batch, point) for point in points]
        return torch.stack(results)

    def _loss_at(self, batch: Any, point: Point) -> Tensor:
        self._point = point
        try:
            for name in self._whole_forward or ():
                self._enter(name)
            with self._watch() if self._whole_forward is None else nullcontext():
                return self.evaluate(batch)
        finally:
            for name, clean in self._clean.items():
                self.weights.tensors[name].data = clean
            self._clean.clear()
            self._depth.clear()

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Within this block, a trained tensor handed to torch while none of its modules runs is noted."""
        names = {id(tensor): name for name, tensor in self.weights.tensors.items()}

        def note(value: Any) -> None:
            if isinstance(value, (tuple, list)):
                for item in value:
                    note(item)
            else:
                name = names.get(id(value))
                if name is not None and name not in self._depth:
                    self._read_outside.add(name)

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if not _asks_no_values(func, result):
                    note(args)
                    note(list((kwargs or {}).values()))
                return result

        # a compiled graph would call no torch function
        with torch.compiler.set_stance("force_eager") if _may_be_compiled() else nullcontext(), Watch():
            yield

    def _find_read_outside(self) -> bool:
        """After the first queries: are there tensors that perturbing their own modules' forwards does not cover?"""
        self._whole_forward = [
            name for name in self.weights.tensors if name in self._read_outside or name not in self._visited
        ]
        if self._whole_forward:
            names = ", ".join(self._whole_forward[:5]) + (" ..." if len(self._whole_forward) > 5 else "")
            log.warning(
                "engine=layerwise: %d trainable tensors are read outside their own module's forward, or not reached by "
                "it (%s); they are perturbed for the whole forward instead. If the objective never uses them they only "
                "move at random: exclude them with trainable=regex.",
                len(self._whole_forward),
                names,
            )
        return bool(self._whole_forward)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for module, held in self.weights.owners.items():
                names = [name for _, name in held]
                enter = _uncompiled(lambda _m, _i, names=names: self._enter_all(names))
                leave = _uncompiled(lambda _m, _i, _o, names=names: self._leave_all(names))
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_all(self, names: list[str]) -> None:
        for name in names:
            self._visited.add(name)
            self._enter(name)

    def _leave_all(self, names: list[str]) -> None:
        for name in names:
            if name in self._depth:
                self._leave(name)

    def _enter(self, name: str) -> None:
        self._depth[name] = self._depth.get(name, 0) + 1
        if self._depth[name] > 1 or self._point.direction is None:
            return
        tensor = self.weights.tensors[name]
        self._clean[name] = tensor.data
        tensor.data = perturbed(tensor.data, self.coordinates.z(self._point.direction, name), self._point.scale)

    def _leave(self, name: str) -> None:
        if self._depth[name] == 1 and name in self._clean:
            self.weights.tensors[name].data = self._clean[name]
            del self._clean[name]  # after the assignment: whatever interrupts, the clean storage is not lost
        self._depth[name] -= 1
        if self._depth[name] == 0:
            del self._depth[name]


def _may_be_compiled() -> bool:
    return "torch._dynamo" in sys.modules  # torch.compile imports it; importing it for nothing takes seconds


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile does not trace: it would compile it again for every module, up to its limit."""
    return torch.compiler.disable(hook) if _may_be_compiled() else hook


_METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_pinned", "is_shared", "type"),
    *("__len__", "__hash__", "data_ptr", "untyped_storage"),
}


def _asks_no_values(func: Any, result: Any) -> bool:
    """Shapes, dtypes and the like are read everywhere and do not depend on what the weights are."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute: .data and .T are values, .shape and .dtype are not, and neither is .grad
        return not isinstance(result, torch.Tensor) or getattr(func.__self__, "__name__", "") == "grad"
    return name in _METADATA
