"""The full space in which some tensors stand still along a direction: their part of z is zero."""

from __future__ import annotations

from zoft.noise.direction import Direction
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, torch


class BoundPartial(BoundSubspace):
    """The full space restricted to the tensors for which :meth:`moves` says so; the others have z = 0."""

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j z_j; zeros where the tensor does not move."""
        # which block moves is a matter of the step, the same for all its directions
        if not self.moves(terms[0][0], name):
            return self._zeros(name, stop - start)
        return super().combination(name, start, stop, terms)

    def draw(self, direction: Direction, name: str, start: int, stop: int) -> Tensor:
        """Coordinates [start, stop) of one direction, flat, float32; zeros where the tensor does not move."""
        if not self.moves(direction, name):
            return self._zeros(name, stop - start)
        return super().draw(direction, name, start, stop)

    def z(self, direction: Direction, name: str) -> Tensor:
        """The direction for tensor ``name``; fresh zeros, which are not kept, where it does not move."""
        if not self.moves(direction, name):
            tensor = self.weights.tensors[name]
            return self._zeros(name, tensor.numel()).view(tensor.shape)
        return super().z(direction, name)

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z``; nothing where the tensor does not move."""
        if self.moves(direction, name):
            super().add_(out, direction, name, start, scale)

    def perturbed_rows(self, direction: Direction, name: str, rows: Tensor, scale: float) -> Tensor:
        """Rows of the matrix ``name`` at theta + scale * z: [len(rows), columns], in W's dtype."""
        if self.moves(direction, name):
            return super().perturbed_rows(direction, name, rows, scale)
        return self.weights.tensors[name].data[rows]

    def _zeros(self, name: str, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float32, device=self.weights.tensors[name].device)
