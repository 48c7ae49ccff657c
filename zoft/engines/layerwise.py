"""Perturb each module only while it computes, in memory of its own: the weights are read and never written.

:mod:`zoft.engines._survey` says which tensors that covers, :mod:`zoft.engines._swapper` perturbs them, and the session
here says which points go through the model together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import attrgetter
from typing import Any, ClassVar

from zoft.engines._optional import device_of
from zoft.engines._pieces import watching
from zoft.engines._step_prefix import StepPrefix
from zoft.engines._survey import Survey, graphs_exist, is_compiled
from zoft.engines._swapper import Swapper
from zoft.engines.base import Engine, Objective, Session, memory_errors_say, of_example, refuse_derivatives
from zoft.estimators.base import Point
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

log = logging.getLogger(__name__)


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
    calls that get a trained tensor outside of its own module are looked at (where torch has compiled something, one
    forward in fifty): a read that a later batch causes is found too, and its points are computed again. Not seen: a
    later read of torch's own attention modules, one in another thread or inside scripted code, and a view that was
    taken before the query (a view does not follow its parameter's swapped storage).

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


class LayerwiseSession(Session):
    """Schedules the forwards of points: one after the other, or those along one direction side by side.

    Args:
        model: the module whose weights move.
        coordinates: the subspace bound to its weights.
        objective: batch -> scalar loss.
        piece_mb: as of the engine.
    """

    name: ClassVar[str] = "layerwise"
    swapper_class: ClassVar[type[Swapper]] = Swapper

    def __init__(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, piece_mb: int = 0) -> None:
        super().__init__(model, coordinates, objective)
        device = device_of(self, next(iter(self.weights.tensors)))
        self.swapper = self.swapper_class(coordinates, (piece_mb or (16 if device.type == "cpu" else 256)) << 20)
        self.survey = Survey(self.name, model, self.swapper)
        self._side_by_side = True
        self._too_large = 0  # bytes of an activation that keeps forwards apart
        self._has_said = False

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """The objective at each point (see the base class)."""
        return torch.stack(self.evaluate_all([(batch, point) for point in points]))

    def losses_per_example(
        self, examples: Sequence[Any], points: Sequence[Point], numbers: Sequence[int] | None = None
    ) -> Tensor:
        """The objective of each example along its own directions; examples go through the model side by side too."""
        numbered = zip(examples, range(len(examples)) if numbers is None else numbers, strict=True)
        pairs = [(one, of_example(point, number)) for one, number in numbered for point in points]
        return torch.stack(self.evaluate_all(pairs)).view(len(examples), len(points)).T

    def evaluate_all(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        """The objective of each batch at its point, scalars; the first call is the survey's."""
        points = [point for _, point in pairs]
        refuse_derivatives(points, self.name)
        swapper, survey = self.swapper, self.survey
        swapper.compiled = is_compiled(self.model)
        small = swapper.largest_output <= swapper.piece_bytes  # as the queries before have seen it
        self._too_large = 0 if small else swapper.largest_output
        self._side_by_side = small and not (survey.whole_forward or swapper.compiled or survey.sets_global_state)
        swapper.largest_output = 0
        with memory_errors_say(self.what_to_lower()), self._hooks(), self._no_graph():
            if not survey.is_done:
                results = [self._loss_at(batch, point) for batch, point in pairs]
                return self._in_groups(pairs, points) if self._conclude() else results
            with survey.later(lambda: self._loss_at(*pairs[0])):
                results = self._in_groups(pairs, points)
                if self._find_new_reads():
                    self._side_by_side = False
                    results = self._in_groups(pairs, points)
            return results

    def _conclude(self) -> bool:
        """After the first queries: whether some tensors are perturbed for the whole forward from now on."""
        return self.survey.conclude(self.swapper.state)

    def _find_new_reads(self) -> bool:
        """After later queries: whether further tensors are perturbed for the whole forward from now on."""
        return self.survey.find_new()

    def _hooks(self) -> AbstractContextManager[None]:
        return self.swapper.hooks()

    @contextmanager
    def _no_graph(self) -> Iterator[None]:
        """Inference mode; in the first queries only no gradients (see :meth:`Session.evaluate`).

        A graph that torch compiled before the hooks were there does not call them. It is not used inside an overriding
        context, which is one of the things that a graph depends on.
        """
        graphs = self.swapper.compiled or graphs_exist()  # looking at every torch function takes time, too
        overriding = watching(lambda func, args, kwargs: func(*args, **kwargs)) if graphs else nullcontext()
        with overriding, torch.inference_mode() if self.survey.is_done else torch.no_grad():
            yield

    def what_to_lower(self) -> str:
        """The setting of this engine that bounds its memory; errors for want of memory name it."""
        return f"engine.piece_mb (now {self.swapper.piece_bytes >> 20})"

    # ---- which points go together ------------------------------------------------------------------------------------

    def _in_groups(self, pairs: list[tuple[Any, Point]], points: list[Point]) -> list[Tensor]:
        results: list[Tensor] = []
        same_batch = all(batch is pairs[0][0] for batch, _ in pairs)
        # Once here, for all: coroutines that each entered and left it would do so in turns, and leave it on.
        with torch.inference_mode(), self._prefix_reused(points) if same_batch else nullcontext():
            waiting = iter(pairs)
            for group in self.groups(points):
                if len(group) == 1:  # a single forward has no other to wait for
                    results.append(self._loss_at(*next(waiting)))
                else:
                    calls = [partial(self._loss_at, *pair) for pair in islice(waiting, len(group))]
                    results += self.swapper.lockstep.run(calls)
        return results

    def groups(self, points: Sequence[Point]) -> Iterator[list[Point]]:
        """Points that go through the model side by side: those along one direction whose z is not kept anyway.

        A forward that waits keeps its activations. Where one of them is larger than the scratch, making z again costs
        little beside the forward, and the memory counts.
        """
        if self._too_large and not self._has_said:
            self._has_said = True
            log.info(
                "engine=%s: an activation takes %d MiB, more than engine.piece_mb=%d: points go one after the other, "
                "to keep within the memory of a forward, and z is made for each",
                *(self.name, self._too_large >> 20, self.swapper.piece_bytes >> 20),
            )
        for direction, group in groupby(points, key=attrgetter("direction")):
            if direction is None or self.coordinates.keeps or not self._side_by_side:
                for point in group:
                    yield [point]
            else:
                yield list(group)

    @contextmanager
    def _prefix_reused(self, points: Sequence[Point]) -> Iterator[None]:
        """Where these points move some blocks only, the layers below them run once."""
        directions = {point.direction for point in points if point.direction is not None}
        moving = set[str]().union(*map(self.coordinates.moving, directions))
        if len(moving) == len(self.weights.tensors) or self.survey.whole_forward or self.swapper.compiled:
            yield
            return
        owners = {module for module, held in self.weights.owners.items() if any(name in moving for _, name in held)}
        prefix = StepPrefix(
            self.model,
            lambda: self.swapper.state.prefix,
            lambda: self.swapper.state.entered_since.clear(),
            lambda: not moving.isdisjoint(self.swapper.state.entered_since),
        )
        with prefix.reused(owners):
            yield

    # ---- one forward -------------------------------------------------------------------------------------------------

    def _loss_at(self, batch: Any, point: Point) -> Tensor:
        with (
            self.swapper.forward(point, self.survey.whole_forward),
            nullcontext() if self.survey.is_done else self.survey.first(),
        ):
            return self.evaluate(batch)
