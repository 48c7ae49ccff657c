"""Directions beside the weights: y = x W^T + s (x V) U^T, with many points in one product."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from zoft.engines._pieces import LinearCall
from zoft.engines._prefix import forwards_replaced
from zoft.engines._swapper import Swapper
from zoft.engines.base import Engine, Objective, Session
from zoft.engines.layerwise import LayerwiseSession
from zoft.estimators.base import Point
from zoft.noise.direction import Direction
from zoft.subspaces._node_layers import is_matrix
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, nn, torch

log = logging.getLogger(__name__)

_MAX_OUTPUT = 1 << 26  # bytes that the outputs of one layer may take for all points together: 64 MiB


@dataclass
class SidePath(Engine):
    """Low-rank directions and adapters at the price of the forward: large matrices are multiplied with, never copied.

    The points of a step go through the model side by side. Where they meet at a linear layer whose matrix is frozen, or
    moves along U V^T, all their inputs are multiplied with the one clean matrix at once, and each gets its own
    s (x V) U^T beside. What else is trained (adapters, norms, biases) is small and perturbed as engine=layerwise does,
    and so are matrices that the direction moves in full. Weights are never written.

    Args:
        tokens_in_flight: points go together as long as their tokens are no more than this; bounds the memory of
            activations. 0 chooses by device (1024 on a CPU, where a larger product is no faster, 32768 on a GPU).
        piece_mb: matrices larger than this that move in full are perturbed in pieces of this size, in MiB; 0 chooses by
            device.

    References: Sarkar et al. 2025 (EGGROLL) for low-rank directions beside the weights.
    """

    tokens_in_flight: int = 0
    piece_mb: int = 0

    def check(self) -> None:
        """Refuse negative sizes."""
        self.require(self.tokens_in_flight >= 0, "tokens_in_flight", "at least 0")
        self.require(self.piece_mb >= 0, "piece_mb", "at least 0")

    def bind(self, model: nn.Module, coordinates: BoundSubspace, objective: Objective) -> Session:
        """Hooks are set only while losses are computed."""
        return _SidePathSession(model, coordinates, objective, self.piece_mb, self.tokens_in_flight)


class _SidePathSwapper(Swapper):
    """Multiplies with U V^T beside the clean matrix, where a direction has that form."""

    def __init__(self, coordinates: BoundSubspace, piece_bytes: int) -> None:
        super().__init__(coordinates, piece_bytes)
        self.tokens = 0  # of one forward, as its largest linear layer sees them
        self.factors: dict[tuple[Direction, str], tuple[Tensor, Tensor] | None] = {}  # of the points in flight

    def see(self, output: Tensor) -> None:
        super().see(output)
        # tokens of the largest layer: they bound what goes together
        if output.dim() > 1:
            self.tokens = max(self.tokens, output.numel() // output.shape[-1])

    def in_pieces(self, module: nn.Module, name: str) -> bool:
        direction = self.point.direction
        assert direction is not None
        # rows of an embedding, or x V of a layer, need no perturbed matrix
        served = isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not self.compiled
        return (served and self._factors_of(direction, name) is not None) or super().in_pieces(module, name)

    def _factors_of(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(U, V) of a direction, made once for the points in flight."""
        if (direction, name) not in self.factors:
            # factors outlive the query's inference mode: other points of the direction use them
            with torch.inference_mode(False), torch.no_grad():
                self.factors[direction, name] = self.coordinates.factors(direction, name)
        return self.factors[direction, name]

    def linears(self, name: str, weight: Tensor, calls: Sequence[LinearCall]) -> list[Tensor] | None:
        """x W^T + s (x V) U^T + b for all forwards that have come to this layer."""
        factors = {c.point.direction: self._factors_of(c.point.direction, name) for c in calls if c.point.direction}
        # some direction moves this matrix in full: it is perturbed in pieces, as by layerwise
        if any(pair is None for pair in factors.values()):
            return None
        # x W^T for all of them in one product
        outputs = _in_one_product([c.x for c in calls], lambda x: torch.nn.functional.linear(x, weight.data))
        for y, (x, bias, point) in zip(outputs, calls, strict=True):
            u, v = factors[point.direction]  # type: ignore[index, misc]
            # + s (x V) U^T + b, each forward's own
            y.add_(((x @ v.to(x.dtype)) @ (point.scale * u).to(x.dtype).T).to(y.dtype))
            if bias is not None:
                y.add_(bias)
        return outputs


class _SidePathSession(LayerwiseSession):
    name = "side_path"
    swapper_class = _SidePathSwapper
    swapper: _SidePathSwapper

    def __init__(
        self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, piece_mb: int, tokens_in_flight: int
    ) -> None:
        super().__init__(model, coordinates, objective, piece_mb)
        device = next(iter(self.weights.tensors.values())).device
        self.tokens_in_flight = tokens_in_flight or (1024 if device.type == "cpu" else 32768)
        self._tokens_before = 0
        self._in_flight = 1
        self._has_said_size = False

    def evaluate_all(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        self._tokens_before, self.swapper.tokens = self.swapper.tokens, 0
        self.swapper.factors.clear()
        return super().evaluate_all(pairs)

    def what_to_lower(self) -> str:
        return f"engine.tokens_in_flight (now {self.tokens_in_flight}), or {super().what_to_lower()}"

    # ---- which points go together ------------------------------------------------------------------------------------

    def groups(self, points: Sequence[Point]) -> Iterator[list[Point]]:
        """As many points as the tokens in flight allow; the clean point goes alone."""
        swapper = self.swapper
        for clean, group in groupby(points, key=lambda point: point.direction is None):
            members = list(group)
            while members:
                # of the queries before, until this one's first layer says otherwise
                tokens = max(1, swapper.tokens or self._tokens_before)
                # a clean forward shares nothing with perturbed ones but x W^T, and needs no factors
                one_by_one = clean or swapper.compiled or self.survey.sets_global_state
                size = 1 if one_by_one else max(1, self.tokens_in_flight // tokens)
                if size < len(members) and not clean:
                    self._say(size, len(members))
                self._in_flight = min(size, len(members))
                # at most the factors of one group are in memory
                swapper.factors.clear()
                yield members[:size]
                members = members[size:]

    def _say(self, size: int, of: int) -> None:
        if not self._has_said_size:
            log.info(
                "engine=side_path: %d tokens a forward: %d of %d points go through the model together, to keep within "
                "engine.tokens_in_flight=%d",
                *(self.swapper.tokens or self._tokens_before, size, of, self.tokens_in_flight),
            )
            self._has_said_size = True

    # ---- linear layers that do not move ------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Besides the hooks: frozen linear layers are computed for all forwards at once."""
        frozen = () if self.swapper.compiled else filter(self._is_frozen_linear, self.model.modules())
        with forwards_replaced(frozen, lambda module: self._shared(module, module.forward)), super()._hooks():
            yield

    def _is_frozen_linear(self, module: nn.Module) -> bool:
        names = [name for _, name in self.weights.owners.get(module, [])]
        return is_matrix(module) and not any(map(self.coordinates.ever_moves, names))

    def _shared(self, module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        outputs = int(module.out_features if isinstance(module, torch.nn.Linear) else module.nf)  # type: ignore[arg-type]
        swapper = self.swapper

        def shared(*args: Any, **kwargs: Any) -> Tensor:
            # called in a way that a plain linear layer is not: as the class has it
            if len(args) != 1 or kwargs:
                return forward(*args, **kwargs)
            (x,) = args
            state = swapper.state
            state.visits[id(module)] += 1
            if state.point.direction is None or not state.entered:
                return forward(x)  # nothing trained has run yet: the same for every point
            tokens = x.numel() // x.shape[-1]
            swapper.tokens = max(swapper.tokens, tokens)
            # all points' outputs in one tensor would be large, and the product is no faster then
            if tokens * outputs * x.element_size() * self._in_flight > _MAX_OUTPUT:
                return forward(x)
            key = ("frozen", id(module), state.visits[id(module)])
            return swapper.sync(key, x, lambda xs: _in_one_product(xs, forward))

        return shared


def _in_one_product(xs: Sequence[Tensor], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A layer's outputs for several inputs [..., n], from one call with all their rows."""
    if len(xs) == 1:
        return [forward(xs[0])]
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    y = forward(torch.cat(rows))
    pieces = y.split([len(r) for r in rows])
    # back into one output for each forward, of its own leading shape
    return [piece.view(*x.shape[:-1], y.shape[-1]) for piece, x in zip(pieces, xs, strict=True)]
