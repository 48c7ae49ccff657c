"""Block coordinates: some layers move while the others stand still, one block after another (MeZO-BCD, LeZO)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._partial import BoundPartial
from zoft.subspaces.base import Subspace
from zoft.utils.lazy import Tensor
from zoft.weights.tensors import Weights, layer_of

ORDERS = ("cyclic", "random")


@dataclass
class Blocks(Subspace):
    """One block of layers moves at a time; within it every weight is its own coordinate, as in ``full``.

    A layer is all that shares the first number in its tensors' names, such as model.layers.7 (in T5 encoder.block.0,
    ..., decoder.block.0, ...). A pass over the model is cut into blocks of ``block_size`` layers, each of which moves
    for ``interval`` steps; the last may be smaller, and what is in no layer (embeddings, final norm, head) is a block
    of its own that ends the pass. To leave that out, as the code of MeZO-BCD does, or anything else, do not train it
    (trainable=regex).

    Args:
        law: distribution of one direction, the same numbers as in ``full``: gaussian, rademacher (+-1), or sphere
            (uniform over all trained weights, of which a block sees its own).
        block_size: layers that move together, at least 1.
        order: cyclic (the model's own order, neighbours together) or random (dealt anew for every pass).
        interval: steps for which a block moves, at least 1.

    References: Park et al. 2025 (MeZO-BCD, arXiv 2501.19099): block_size 1, and in its code random order. Wang et al.
    2024 (LeZO, arXiv 2410.09823): random order, interval 1 and block_size (1 - rho) times the number of layers; it
    draws every step's layers afresh, while a pass here has each of them once.
    """

    block_size: int = 1
    order: str = "cyclic"
    interval: int = 1

    def check(self) -> None:
        """Refuse an unknown law or order, and counts below 1."""
        super().check()
        self.require(self.block_size >= 1, "block_size", "at least 1")
        self.require(self.order in ORDERS, "order", f"one of {', '.join(ORDERS)}")
        self.require(self.interval >= 1, "interval", "at least 1")

    def bind(self, weights: Weights, noise: str = "counter") -> BoundBlock:
        """Coordinates are the elements of the tensors that move."""
        return BoundBlock(weights, self.source(weights, noise), self)


class BoundBlock(BoundPartial):
    """The full space restricted to the block of the step; what does not move has z = 0.

    Args:
        weights: what is trained.
        source: where random numbers come from.
        blocks: the component: size, order and interval.

    Raises:
        UserError: no trained tensor belongs to a numbered layer.

    Example:
        >>> import torch
        >>> weights = Weights(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
        >>> coordinates = Blocks().bind(weights)
        >>> [name for name in weights.tensors if coordinates.moves(Direction(0, 1), name)]
        ['1.weight', '1.bias']
    """

    def __init__(self, weights: Weights, source: NoiseSource, blocks: Blocks) -> None:
        super().__init__(weights, source)
        self.blocks = blocks
        self.layer_of = {name: layer_of(name) for name in weights.tensors}
        # in the model's order: Python's dicts keep it
        self._layers = list(dict.fromkeys(layer for layer in self.layer_of.values() if layer is not None))
        if not self._layers:
            raise UserError(
                "subspace=blocks moves some layers at a time, and no trained tensor has a layer's number in its name "
                f"(they have names such as {next(iter(weights.tensors))}): use subspace=full"
            )
        self._outside = None in self.layer_of.values()
        self._last: tuple[int, int, frozenset[str | None]] = (-1, -1, frozenset())

    @property
    def num_blocks(self) -> int:
        """Blocks in a pass, the one of what is in no layer included."""
        # ceil(layers / block_size), and one of what is in no layer
        return -(-len(self._layers) // self.blocks.block_size) + self._outside

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether ``name`` is in the block of the direction's step."""
        return self.layer_of[name] in self._moving(direction) and super().moves(direction, name)

    def _moving(self, direction: Direction) -> frozenset[str | None]:
        """The layers of the step's block; {None} is what is in no layer."""
        index = direction.step // self.blocks.interval
        if self._last[:2] != (direction.seed, index):
            # steps -> blocks -> (pass over the model, place in the pass)
            in_pass, position = divmod(index, self.num_blocks)
            size = self.blocks.block_size
            layers = self._order(direction.seed, in_pass)[position * size : (position + 1) * size]
            # past the last layer the slice is empty: the block of what is in no layer
            self._last = (direction.seed, index, frozenset(layers) or frozenset({None}))
        return self._last[2]

    def _order(self, seed: int, in_pass: int) -> list[str]:
        if self.blocks.order == "cyclic":
            return self._layers
        # a key for every layer and pass: sorting by it deals the layers anew, the same for everyone
        return sorted(self._layers, key=lambda layer: key_of(Direction(seed, in_pass), layer, role="blocks.order"))

    def combination(self, name: str, start: int, stop: int, terms: list[tuple[Direction, float]]) -> Tensor:
        """sum_j c_j z_j; refused where the directions might not move the same block."""
        # the block is the step's: directions of another step might move another one
        if len({(direction.seed, direction.step) for direction, _ in terms}) > 1:
            raise UserError(
                "subspace=blocks moves one block along all directions of a step, and these have a seed each: "
                "use subspace=full with direction_seeds"
            )
        return super().combination(name, start, stop, terms)
