"""Reading a large perturbed matrix without making it: the rows that are looked up, or some outputs at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from zoft.estimators.base import Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, torch


class LinearCall(NamedTuple):
    """What a forward asks of a linear layer.

    Args:
        x: inputs, [..., n].
        bias: [m], or None.
        point: where the forward is.
    """

    x: Any
    bias: Any
    point: Point


class PieceReader(Protocol):
    """The part of a swapper that piecewise reading uses."""

    coordinates: BoundSubspace
    scratch: Any  # zoft.engines._swapper.Scratch
    piece_bytes: int

    @property
    def point(self) -> Point:
        """Where the running forward is."""

    def sync(self, key: Any, item: Any, batch_fn: Any) -> Any:
        """Do the work once for all forwards that come to ``key``."""

    def perturb(self, name: str, start: int, points: Sequence[Point], outs: Sequence[Tensor]) -> None:
        """Make a piece of a tensor at each point."""

    def linears(self, name: str, weight: Tensor, calls: Sequence[LinearCall]) -> list[Tensor] | None:
        """Another way to compute the layer for these calls, or None."""


class Reads:
    """Within :meth:`mode`, torch functions that are handed one of ``tensors`` compute with the perturbed one.

    Args:
        swapper: whose point the perturbation is at.
        tensors: name -> the parameter, a matrix.
        visit: names this visit of the module, for the forwards that run side by side.
    """

    def __init__(self, swapper: PieceReader, tensors: dict[str, Tensor], visit: Any) -> None:
        self.swapper = swapper
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.visit = visit
        self.num_reads = 0

    def mode(self) -> Any:
        """The context; enter and leave it like any other."""
        return watching(self._call)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Embedding and linear are computed in pieces; anything else gets the whole perturbed matrix."""
        # by identity: a tensor that compares equal may be another one
        if not any(id(value) in self.names for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func is torch.nn.functional.embedding and len(args) > 1:
            return self._embedding(*args, **kwargs)
        if func is torch.nn.functional.linear and len(args) > 1 and id(args[1]) in self.names:
            return self._linear(*args, **kwargs)
        # shape or dtype of the parameter: no values are asked for, so there is nothing to perturb
        result = func(*args, **kwargs)
        if asks_no_values(func, result):
            return result
        return func(*map(self._whole, args), **{key: self._whole(value) for key, value in kwargs.items()})

    def _embedding(self, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The rows in use, once each; what else a lookup can be asked for concerns its gradient."""
        point, name = self.swapper.point, self.names[id(weight)]
        assert point.direction is not None
        # an embedding of V rows is perturbed in the rows of this batch only: W[rows] + s z[rows]
        rows, places = ids.unique(return_inverse=True)
        moved = self.swapper.coordinates.perturbed_rows(point.direction, name, rows, point.scale)
        return torch.nn.functional.embedding(places, moved)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b with W made piece by piece, each piece for all forwards that have come here."""
        self.num_reads += 1
        name = self.names[id(weight)]
        key = ("linear", self.visit, self.num_reads)
        b = None if bias is None else bias.data  # this forward's own; the others are shown the clean one meanwhile
        call = LinearCall(x, b, self.swapper.point)
        return self.swapper.sync(key, call, lambda calls: self._linears(name, weight, calls))

    def _linears(self, name: str, weight: Tensor, calls: list[LinearCall]) -> list[Tensor]:
        by_side_path = self.swapper.linears(name, weight, calls)
        if by_side_path is not None:
            return by_side_path
        swapper, (outputs, inputs) = self.swapper, weight.shape
        # about piece_bytes of the matrix at a time, so that a piece is still in the cache for the product
        rows = max(1, swapper.piece_bytes // (inputs * weight.element_size()))
        count = -(-outputs // rows)
        rows = -(-outputs // count)  # alike: a narrow last product would take nearly as long as a wide one
        # one piece of memory for each forward: all of them hold the same rows, at other points
        leases = [swapper.scratch.lease([weight.data[:rows]]) for _ in calls]
        results: list[Tensor] = []
        for first in range(0, outputs, rows):
            last = min(outputs, first + rows)
            pieces = [lease.tensors[0][: last - first] for lease in leases]
            swapper.perturb(name, first * inputs, [call.point for call in calls], [p.view(-1) for p in pieces])
            # y[..., first:last] = x (W + s z)[first:last]^T + b[first:last]
            for index, ((x, bias, _), piece) in enumerate(zip(calls, pieces, strict=True)):
                y = torch.nn.functional.linear(x, piece, None if bias is None else bias[first:last])
                if not first:
                    results.append(y.new_empty((*y.shape[:-1], outputs)))
                results[index][..., first:last] = y
        for lease in leases:
            swapper.scratch.give_back(lease)
        return results

    def _whole(self, value: Any) -> Any:
        name = self.names.get(id(value))
        if name is None:
            return value
        # a function that reads the matrix in another way gets it whole, for the length of that call
        moved = torch.empty_like(value.data)
        self.swapper.perturb(name, 0, [self.swapper.point], [moved.view(-1)])
        return moved


@lru_cache(maxsize=1)
def _function_mode() -> Any:
    class FunctionMode(torch.overrides.TorchFunctionMode):
        """Every torch function goes through ``call(func, args, kwargs)``."""

        def __init__(self, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
            super().__init__()
            self.call = call

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return self.call(func, args, kwargs or {})

    return FunctionMode


def watching(call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
    """A context in which every torch function goes through ``call(func, args, kwargs)``, which must call it."""
    return _function_mode()(call)


_METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_pinned", "is_shared", "type"),
    *("__len__", "__hash__", "data_ptr", "untyped_storage", "requires_grad_"),
}


def asks_no_values(func: Any, result: Any) -> bool:
    """Shapes, dtypes and the like are read everywhere and do not depend on what the weights are."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute: .data and .T are values, .shape and .dtype are not, and neither is .grad
        return not isinstance(result, torch.Tensor) or getattr(func.__self__, "__name__", "") == "grad"
    if name == "__set__":
        return getattr(func.__self__, "__name__", "") in ("requires_grad", "grad")
    return name in _METADATA
