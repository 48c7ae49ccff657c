"""Read-only weights: each module computes with W + s z in a scratch that lives as long as its forward."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    A module's perturbed tensors exist only while its own forward runs: extra memory is the largest module. A tensor
    that is read without its module's forward being called (some attention layers do that) is perturbed for the whole
    forward instead; this is found out in the first query and said once.
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
        self._whole_forward: list[str] | None = None  # tensors read outside their module's forward; None: not known yet
        self._point = Point()

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        refuse_derivatives(points, "layerwise")
        with self._hooks():
            results = [self._loss_at(batch, point) for point in points]
            if self._whole_forward is None and self._find_unvisited():
                results = [self._loss_at(batch, point) for point in points]
        return torch.stack(results)

    def _loss_at(self, batch: Any, point: Point) -> Tensor:
        self._point = point
        try:
            for name in self._whole_forward or ():
                self._enter(name)
            return self.evaluate(batch)
        finally:
            for name, clean in self._clean.items():
                self.weights.tensors[name].data = clean
            self._clean.clear()
            self._depth.clear()

    def _find_unvisited(self) -> bool:
        """After the first queries: are there tensors that their own modules' forwards did not reach?"""
        self._whole_forward = [name for name in self.weights.tensors if name not in self._visited]
        if self._whole_forward:
            names = ", ".join(self._whole_forward[:5]) + (" ..." if len(self._whole_forward) > 5 else "")
            log.warning(
                "engine=layerwise: %d trainable tensors are not reached by their own module's forward (%s); "
                "they are perturbed for the whole forward instead. If the objective never uses them they only move "
                "at random: exclude them with trainable=regex.",
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
                handles.append(module.register_forward_pre_hook(lambda _m, _i, names=names: self._enter_all(names)))
                handles.append(
                    module.register_forward_hook(
                        lambda _m, _i, _o, names=names: self._leave_all(names), always_call=True
                    )
                )
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
        if self._point.direction is None:
            return
        self._depth[name] = self._depth.get(name, 0) + 1
        if self._depth[name] > 1:
            return
        tensor = self.weights.tensors[name]
        self._clean[name] = tensor.data
        tensor.data = perturbed(tensor.data, self.coordinates.z(self._point.direction, name), self._point.scale)

    def _leave(self, name: str) -> None:
        self._depth[name] -= 1
        if self._depth[name] == 0:
            self.weights.tensors[name].data = self._clean.pop(name)
            del self._depth[name]
