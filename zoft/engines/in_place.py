"""Perturb the weights themselves and restore them, as MeZO does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from zoft.engines._lockstep import Lockstep
from zoft.engines._optional import LeavesTrace
from zoft.engines.base import Engine, Objective, Session, memory_errors_say, refuse_derivatives
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.noise.mezo import TorchSequentialNoise
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch
from zoft.utils.meeting import MEET
from zoft.weights.tensors import perturbed

RESTORES = ("auto", "copy", "subtract")
NO_WAY_BACK = (
    "engine.restore=subtract does not bring {} weights back (12 % off after 1000 steps at eps 1e-3): use "
    "engine=layerwise, or engine.restore=copy"
)


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

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """Decide how to come back, once the dtypes are known."""
        # bfloat16 and float16: theta + eps z - 2 eps z + eps z does not come back
        low = sorted({str(t.dtype) for t in coordinates.weights.tensors.values() if t.dtype.itemsize < 4})
        restore = self.restore
        if restore == "auto":
            restore = "subtract" if isinstance(coordinates.source, TorchSequentialNoise) and not low else "copy"
        if restore == "subtract" and low:
            raise UserError(NO_WAY_BACK.format(", ".join(low).replace("torch.", "")))
        return (_SubtractSession if restore == "subtract" else _CopySession)(model, coordinates, objective)


class _CopySession(Session):
    """Each point is computed from a saved copy, and the copy is put back at the end: exact."""

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> None:
        super().__init__(model, coordinates, objective)
        self._lockstep, self._meets = Lockstep(), False  # whether the objective waits for something outside

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "in_place")
        with memory_errors_say("use engine=layerwise: a copy of what is trained is kept for engine.restore=copy"):
            # clones of what is trained; frozen weights are not copied
            saved = {name: tensor.data.clone() for name, tensor in self.weights.tensors.items()}
            calls = [partial(self._at, saved, batch, point) for point in points]
            try:
                # inference mode once for all: calls that take turns would leave it on
                with torch.inference_mode() if self._meets else nullcontext():
                    return torch.stack(self._lockstep.run(calls) if self._meets else [call() for call in calls])
            finally:
                for name, clean in saved.items():
                    self.weights.tensors[name].data.copy_(clean)

    def _at(self, saved: dict[str, Tensor], batch: Any, point: Point) -> Tensor:
        def sync(*what: Any) -> Any:
            self._meets = True
            share = self._lockstep.sync(*what)
            if self._lockstep.is_running:  # the weights are at another point meanwhile
                self._move(saved, point)
            return share

        self._move(saved, point)
        token = MEET.set(sync)
        try:
            return self.evaluate(batch)
        finally:
            MEET.reset(token)

    def _move(self, saved: dict[str, Tensor], point: Point) -> None:
        # always from the clean copy, never from the point before: no error adds up
        with torch.inference_mode(False), torch.no_grad():
            for name, clean in saved.items():
                tensor = self.weights.tensors[name].data
                if point.direction is None or not self.coordinates.moves(point.direction, name):
                    tensor.copy_(clean)
                else:
                    # theta + s z, rounded once to the weight's dtype
                    tensor.copy_(perturbed(clean, self.coordinates.z(point.direction, name), point.scale))


class _SubtractSession(LeavesTrace, Session):
    """The weights walk from point to point by arithmetic: theta + eps z - 2 eps z + eps z, each addition rounded."""

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> None:
        super().__init__(model, coordinates, objective)
        self._here = Point()  # where the weights are
        self._path: list[Point] = []  # where they have been: each addition was rounded

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "in_place")
        results = []
        try:
            with memory_errors_say("task.max_length"):
                for point in points:
                    self._walk(point)
                    self._path.append(point)
                    results.append(self.evaluate(batch))
            # back to theta: one more addition, as in MeZO's code
            self._walk(Point())
        except BaseException:
            self._walk(Point())  # also where a signal came on the way back: that walk has undone what it did
            raise
        return torch.stack(results)

    def pass_over(self, points: Sequence[Point]) -> None:
        # the walk without the losses: the additions are rounded as they were then
        for point in points:
            self._walk(point)
        self._walk(Point())

    def take_path(self) -> list[Point]:
        path, self._path = self._path, []
        return path

    def _walk(self, target: Point) -> None:
        """Move every tensor to ``target``; when something interrupts, move none."""
        moves = []
        # back from the last direction; a walk along the same direction is one move, as -2 eps z in MeZO
        if self._here.direction is not None and self._here.direction != target.direction:
            moves.append((self._here, -self._here.scale))
        if target.direction is not None:
            is_same_line = self._here.direction == target.direction
            moves.append((target, target.scale - self._here.scale if is_same_line else target.scale))
        if not moves:
            return
        begun: list[tuple[Tensor, str, int]] = []
        try:
            for name, tensor in self.weights.tensors.items():
                # piece by piece, so that all moves of a piece find it in the cache
                for start, stop in self.coordinates.spans(name, 0, tensor.numel()):
                    piece = self.piece(name, start, stop)
                    begun.append((piece, name, start))
                    self._add(moves, piece, name, start)
            self._here = target
        except BaseException:
            if self._here is not target:
                for piece, name, start in begun:
                    # torch counts a tensor's in-place writes: an interrupt comes before an addition or after it
                    applied = moves[: piece._version]
                    self._add([(point, -distance) for point, distance in reversed(applied)], piece, name, start)
            raise

    def _add(self, moves: list[tuple[Point, float]], piece: Tensor, name: str, start: int) -> None:
        """Add ``distance * z`` for every (point, distance) to a piece, while it is in the cache."""
        for point, distance in moves:
            if point.direction is not None and self.coordinates.moves(point.direction, name):
                self.coordinates.add_(piece, point.direction, name, start, distance)
