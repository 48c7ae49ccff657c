"""Queries beside a run: at its weights and along its directions, without touching the run's state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoft.engines.base import Objective, Session
from zoft.engines.forward_mode import ForwardMode
from zoft.engines.layerwise import Layerwise
from zoft.estimators.base import Point
from zoft.noise.joint import Orthogonal, Transformed
from zoft.noise.source import NoiseSource
from zoft.subspaces.base import BoundSubspace


class Bystander(Session):
    """A session of one measurement: it remembers what it has asked, counts it, and only reads the weights.

    Losses come from ``layerwise`` and derivatives from ``forward_mode``, whatever engine the run has: both leave the
    weights alone, so nothing has to be restored.

    Args:
        model: the module whose weights move.
        coordinates: a :func:`mirrored` subspace.
        objective: batch -> scalar loss.

    Example:
        >>> from zoft.subspaces.full import Full
        >>> from zoft.weights.tensors import Weights
        >>> layer = nn.Linear(2, 1)
        >>> session = Bystander(layer, Full().bind(Weights(layer)), lambda x: layer(x).square().mean())
        >>> batch = torch.ones(1, 2)
        >>> first, again = session.losses(batch, [Point()]), session.losses(batch, [Point()])
        >>> bool(first == again), session.num_queries
        (True, 1)
    """

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> None:
        super().__init__(model, coordinates, objective)
        self.num_queries = 0
        self._losses = Layerwise().bind(model, coordinates, objective)
        self._slopes = ForwardMode().bind(model, coordinates, objective)
        self._known: dict[tuple[int, Point], Tensor] = {}
        self._batches: list[Any] = []  # kept alive: their identity is the key

    def know(self, batch: Any, points: Sequence[Point], losses: Tensor) -> None:
        """Losses that the run's own queries have found."""
        self._batches.append(batch)
        for point, loss in zip(points, losses, strict=True):
            self._known[id(batch), point] = loss.to("cpu", torch.float32)

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The objective, or its derivative, at each point; a point that is known is not asked again."""
        fresh = [point for point in dict.fromkeys(points) if (id(batch), point) not in self._known]
        exact = any(point.derivative for point in fresh)
        if fresh:
            with _without_warnings():
                self.know(batch, fresh, (self._slopes if exact else self._losses).losses(batch, fresh))
            slopes = sum(point.derivative for point in fresh)
            self.num_queries += 2 * slopes or len(fresh)  # the clean loss comes with a derivative
        return torch.stack([self._known[id(batch), point] for point in points])

    def losses_per_example(
        self, examples: Sequence[Any], points: Sequence[Point], numbers: Sequence[int] | None = None
    ) -> Tensor:
        """As the base class's; all examples at one point are one query."""
        before = self.num_queries
        losses = super().losses_per_example(examples, points, numbers)
        self.num_queries = before + -(-(self.num_queries - before) // max(1, len(examples)))
        return losses


def mirrored(coordinates: BoundSubspace, num_directions: int) -> BoundSubspace:
    """The same subspace and the same directions, with a cache of its own.

    Args:
        coordinates: the run's, in the middle of a step.
        num_directions: how many directions of that step may be asked for; there may be more than the run has.
    """
    other = copy.copy(coordinates)
    other.forget_z()
    other.source = _with_more(coordinates.source, num_directions)
    return other


def _with_more(source: NoiseSource, num_directions: int) -> NoiseSource:
    """A source whose orthogonal directions go on behind the run's: each depends on those before it alone."""
    if not isinstance(source, Transformed):
        return source
    other = copy.copy(source)
    other.inner = _with_more(source.inner, num_directions)
    if isinstance(other, Orthogonal):
        other.num_directions = max(other.num_directions, num_directions)
        other.columns_of_step = None
    return other


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What an engine has to say of the model it has said in the run."""
    engines_log = logging.getLogger("zoft.engines")
    level = engines_log.level
    engines_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        engines_log.setLevel(level)
