"""What every subspace promises: coordinates to draw and to update in, and the way from them to a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.component import Component
from zoft.errors import UserError
from zoft.noise import SOURCES, CounterNoise, Direction, NoiseSource, TorchSequentialNoise, check_law
from zoft.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 20  # elements updated at a time: bounds the temporaries of an update to a few MiB
_KEEP = 1 << 24  # elements of z kept for the step in use: adapters and norms draw each direction once


@dataclass
class Subspace(Component):
    """Which coordinates move.

    Args:
        law: distribution of one direction: gaussian, rademacher (+-1), or sphere (uniform, ||z||^2 = weights).
    """

    law: str = "gaussian"

    def check(self) -> None:
        """Refuse an unknown law."""
        check_law(self.law, f"{self.name()}.law")

    def bind(self, weights: Weights, noise: str = "counter") -> Coordinates:
        """This subspace for these weights, drawing from ``noise`` (one of :data:`zoft.noise.SOURCES`)."""
        raise NotImplementedError

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The noise source by name; MeZO's own stream exists for Gaussian directions only."""
        if noise not in SOURCES:
            raise UserError(f"estimator.noise must be one of {', '.join(SOURCES)}, got {noise!r}")
        if noise == "counter":
            return CounterNoise(self.law, weights.sizes())
        if self.law != "gaussian":
            raise UserError(
                f"noise=torch_sequential draws Gaussian directions; subspace.law={self.law} needs noise=counter"
            )
        return TorchSequentialNoise([(n, t.shape, t.dtype, t.device) for n, t in weights.tensors.items()])


class Coordinates:
    """A subspace bound to tensors: draws coordinates, lifts them to tensors, cuts them into chunks.

    This class is the full space (coordinates are the tensor's own elements); subspaces override what differs.

    Args:
        weights: what is trained.
        source: where random numbers come from.
    """

    def __init__(self, weights: Weights, source: NoiseSource) -> None:
        self.weights = weights
        self.source = source
        self._kept: dict[tuple[Direction, str], Tensor] = {}
        self._kept_elements = 0
        self._kept_step = (-1, -1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the coordinates of tensor ``name``."""
        return tuple(self.weights.tensors[name].shape)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """Flat ranges [start, stop) that cover the coordinates of ``name``."""
        count = self.weights.tensors[name].numel()
        for start in range(0, count, _CHUNK):
            yield start, min(count, start + _CHUNK)

    def draw(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Coordinates [start, stop) of one direction, flat; the caller may overwrite the result."""
        kept = self._kept.get((direction, name))
        if kept is not None:
            return kept.view(-1)[start:stop].clone()
        tensor = self.weights.tensors[name]
        return self.source.draw(direction, name, start, stop, tensor.device, tensor.dtype)

    def lift(self, name: str, coordinates: Tensor, start: int) -> Tensor:
        """The flat piece of tensor ``name``, beginning at ``start``, that these coordinates stand for."""
        del name, start
        return coordinates

    def z(self, direction: Direction, name: str) -> Tensor:
        """The direction for tensor ``name``, in the tensor's shape; read-only (it may be kept for the step)."""
        if self._kept_step != (direction.seed, direction.step):
            self._kept, self._kept_elements = {}, 0
            self._kept_step = (direction.seed, direction.step)
        kept = self._kept.get((direction, name))
        if kept is not None:
            return kept
        tensor = self.weights.tensors[name]
        z = self.source.draw(direction, name, 0, tensor.numel(), tensor.device, tensor.dtype).view(tensor.shape)
        if self._kept_elements + z.numel() <= _KEEP:
            self._kept[direction, name] = z
            self._kept_elements += z.numel()
        return z

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j z_j over coordinates [start, stop) of ``name``: the estimate, never tensor-sized per direction."""
        (first, coefficient), *rest = terms
        total = self.draw(first, name, start, stop).mul_(coefficient)
        for direction, coefficient in rest:
            total.add_(self.draw(direction, name, start, stop).mul_(coefficient))
        return total
