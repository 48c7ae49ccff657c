"""Perturb the weights themselves and put them back: MeZO's way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.engines.base import Engine, Objective, Session, refuse_derivatives
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lazy import torch
from zoft.noise import TorchSequentialNoise
from zoft.subspaces.base import Coordinates
from zoft.weights import perturbed

if TYPE_CHECKING:
    from torch import Tensor, nn

RESTORES = ("auto", "copy", "subtract")


@dataclass
class InPlace(Engine):
    """The weights walk from point to point and come back.

    Args:
        restore: copy puts a saved copy of the trainable weights back (exact in every dtype, that much more memory);
            subtract walks back by arithmetic as MeZO does (no extra memory; float32 drifts in the last bit, bfloat16
            and float16 drift visibly, so they are refused); auto is subtract for MeZO's own noise, else copy.

    References: Malladi et al. 2023 (MeZO), Algorithm 1.
    """

    restore: str = "auto"

    def check(self) -> None:
        """Refuse an unknown way back."""
        self.require(self.restore in RESTORES, "restore", f"one of {', '.join(RESTORES)}")

    def bind(self, model: nn.Module, coordinates: Coordinates, objective: Objective) -> Session:
        """Decide how to come back, once the dtypes are known."""
        low = sorted({str(t.dtype) for t in coordinates.weights.tensors.values() if t.dtype.itemsize < 4})
        restore = self.restore
        if restore == "auto":
            restore = "subtract" if isinstance(coordinates.source, TorchSequentialNoise) and not low else "copy"
        if restore == "subtract" and low:
            raise UserError(
                f"engine.restore=subtract does not bring {', '.join(low).replace('torch.', '')} weights back "
                "(12 % off after 1000 steps at eps 1e-3): use engine=layerwise, or engine.restore=copy"
            )
        return (_SubtractSession if restore == "subtract" else _CopySession)(model, coordinates, objective)


class _CopySession(Session):
    """Each point is computed from a saved copy, and the copy is put back at the end: exact."""

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "in_place")
        saved = {name: tensor.data.clone() for name, tensor in self.weights.tensors.items()}
        results = []
        try:
            for point in points:
                for name, clean in saved.items():
                    tensor = self.weights.tensors[name].data
                    if point.direction is None:
                        tensor.copy_(clean)
                    else:
                        tensor.copy_(perturbed(clean, self.coordinates.z(point.direction, name), point.scale))
                results.append(self.evaluate(batch))
        finally:
            for name, clean in saved.items():
                self.weights.tensors[name].data.copy_(clean)
        return torch.stack(results)


class _SubtractSession(Session):
    """The weights move by (s' - s) z between points of one direction, and by -s z to come back: MeZO's arithmetic."""

    def __init__(self, model: nn.Module, coordinates: Coordinates, objective: Objective) -> None:
        super().__init__(model, coordinates, objective)
        self._here = Point()  # where the weights are

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "in_place")
        results = []
        try:
            for point in points:
                self._walk(point)
                results.append(self.evaluate(batch))
        finally:
            self._walk(Point())
        return torch.stack(results)

    def _walk(self, there: Point) -> None:
        if self._here.direction is not None and self._here.direction != there.direction:
            self._add(self._here, -self._here.scale, Point())
        if there.direction is not None:
            self._add(there, there.scale - self._here.scale, there)

    def _add(self, point: Point, distance: float, arrived: Point) -> None:
        """Move every tensor and set ``_here``; when something interrupts, move none and leave ``_here``."""
        begun: list[tuple[Tensor, str, int, int]] = []
        try:
            for name in self.weights.tensors:
                for start, stop in self.coordinates.chunks(name):
                    step = self._step(point, distance, name, start, stop)
                    piece = self.piece(name, start, stop)
                    begun.append((piece, name, start, stop))
                    piece.add_(step)
            self._here = arrived
        except BaseException:
            if self._here is not arrived:
                for piece, name, start, stop in begun:
                    if piece._version:  # the addition took place: a signal can come before or after it
                        piece.add_(self._step(point, -distance, name, start, stop))
            raise

    def _step(self, point: Point, distance: float, name: str, start: int, stop: int) -> Tensor:
        assert point.direction is not None
        return self.coordinates.draw(point.direction, name, start, stop).mul_(distance)
