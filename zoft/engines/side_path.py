"""Directions beside the weights: y = x W^T + s (x V) U^T, with many points in one product."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from zoft.engines._frozen_prefix import put_back_forward
from zoft.engines._pieces import LinearCall
from zoft.engines.base import Engine, Objective, Session
from zoft.engines.layerwise import LayerwiseSession
from zoft.estimators.base import Point
from zoft.noise.direction import Direction
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


class _SidePathSession(LayerwiseSession):
    name = "side_path"

    def __init__(
        self, model: nn.Module, coordinates: BoundSubspace, objective: Objective, piece_mb: int, tokens_in_flight: int
    ) -> None:
        super().__init__(model, coordinates, objective, piece_mb)
        device = next(iter(self.weights.tensors.values())).device
        self.tokens_in_flight = tokens_in_flight or (1024 if device.type == "cpu" else 32768)
        self._tokens = self._tokens_before = 0  # of one forward, as its largest linear layer sees them
        self._in_flight = 1
        self._told_chunks = False
        self._factors: dict[tuple[Direction, str], tuple[Tensor, Tensor] | None] = {}  # of the points in flight

    def _asked(self, pairs: list[tuple[Any, Point]]) -> list[Tensor]:
        self._tokens_before, self._tokens = self._tokens, 0
        self._factors.clear()
        return super()._asked(pairs)

    def what_to_lower(self) -> str:
        return f"engine.tokens_in_flight (now {self.tokens_in_flight}), or {super().what_to_lower()}"

    # ---- which points go together ------------------------------------------------------------------------------------

    def groups(self, points: Sequence[Point]) -> Iterator[list[Point]]:
        """As many points as the tokens in flight allow; the clean point goes alone."""
        for clean, group in groupby(points, key=lambda point: point.direction is None):
            members = list(group)
            while members:
                tokens = max(1, self._tokens or self._tokens_before)
                size = (
                    1 if clean or self._compiled or self._sets_global_state else max(1, self.tokens_in_flight // tokens)
                )
                if size < len(members) and not clean:
                    self._say(size, len(members))
                self._in_flight = min(size, len(members))
                self._factors.clear()
                yield members[:size]
                members = members[size:]

    def _say(self, size: int, of: int) -> None:
        if not self._told_chunks:
            log.info(
                "engine=side_path: %d tokens a forward: %d of %d points go through the model together, to keep within "
                "engine.tokens_in_flight=%d",
                *(self._tokens or self._tokens_before, size, of, self.tokens_in_flight),
            )
            self._told_chunks = True

    def _see(self, output: Tensor) -> None:
        super()._see(output)
        if output.dim() > 1:
            self._tokens = max(self._tokens, output.numel() // output.shape[-1])

    # ---- linear layers that move along U V^T -------------------------------------------------------------------------

    def _in_pieces(self, module: nn.Module, name: str) -> bool:
        direction = self.point.direction
        assert direction is not None
        served = isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and not self._compiled
        return (served and self._factors_of(direction, name) is not None) or super()._in_pieces(module, name)

    def _factors_of(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(U, V) of a direction, made once for the points in flight."""
        if (direction, name) not in self._factors:
            with torch.inference_mode(False), torch.no_grad():
                self._factors[direction, name] = self.coordinates.factors(direction, name)
        return self._factors[direction, name]

    def linears(self, name: str, weight: Tensor, brought: Sequence[LinearCall]) -> list[Tensor] | None:
        """x W^T + s (x V) U^T + b for everybody who is here."""
        directions = [point.direction for _, _, point in brought]
        factors = {d: self._factors_of(d, name) for d in directions if d is not None}
        if any(pair is None for pair in factors.values()):
            return None
        outputs = self._together([x for x, _, _ in brought], lambda x: torch.nn.functional.linear(x, weight.data))
        for y, (x, bias, point) in zip(outputs, brought, strict=True):
            u, v = factors[point.direction]  # type: ignore[index, misc]
            y.add_(((x @ v.to(x.dtype)) @ (point.scale * u).to(x.dtype).T).to(y.dtype))
            if bias is not None:
                y.add_(bias)
        return outputs

    # ---- linear layers that do not move ------------------------------------------------------------------------------

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Besides the hooks: frozen linear layers are computed for all forwards at once."""
        changed: list[tuple[nn.Module, Any]] = []
        try:
            if not self._compiled:
                for module in self.model.modules():
                    held = [name for _, name in self.weights.owners.get(module, [])]
                    if _is_linear(module) and not any(map(self.coordinates.ever_moves, held)):
                        changed.append((module, module.__dict__.get("forward")))
                        module.forward = self._shared(module, module.forward)
            with super()._hooks():
                yield
        finally:
            for module, before in changed:
                put_back_forward(module, before)

    def _shared(self, module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        outputs = int(module.out_features if isinstance(module, torch.nn.Linear) else module.nf)  # type: ignore[arg-type]

        def shared(*args: Any, **kwargs: Any) -> Tensor:
            if len(args) != 1 or kwargs:
                return forward(*args, **kwargs)
            (x,) = args
            side = self._side
            side.visits[id(module)] += 1
            if side.point.direction is None or not side.entered:
                return forward(x)  # nothing trained has run yet: the same for every point
            tokens = x.numel() // x.shape[-1]
            self._tokens = max(self._tokens, tokens)
            if tokens * outputs * x.element_size() * self._in_flight > _MAX_OUTPUT:
                return forward(x)
            place = ("frozen", id(module), side.visits[id(module)])
            return self.meet(place, x, lambda xs: self._together(xs, forward))

        return shared

    def _together(self, xs: Sequence[Tensor], forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """One product for all inputs [..., n]."""
        if len(xs) == 1:
            return [forward(xs[0])]
        rows = [x.reshape(-1, x.shape[-1]) for x in xs]
        y = forward(torch.cat(rows))
        pieces = y.split([len(r) for r in rows])
        return [piece.view(*x.shape[:-1], y.shape[-1]) for piece, x in zip(pieces, xs, strict=True)]


def _is_linear(module: nn.Module) -> bool:
    """A map of the last dimension alone, row by row: torch's linear layer, and transformers' transposed one."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
