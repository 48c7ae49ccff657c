"""Single coordinates: along each direction one weight moves, and every weight has its turn (CGE, DeepZero)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from zoft.errors import UserError
from zoft.noise.counter import perturb_with
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource, of_step
from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights


@dataclass
class Coordinate(Subspace):
    """One weight moves along a direction z = +-sqrt(d) e_i, of all d that are trained: coordinate-wise differences.

    The weights have their turns in random order, each once in a sweep of d directions.

    ||z||^2 = d as in the full space. The mean of <g, z_i> z_i = d g_i e_i over the d directions of a sweep is the
    gradient, exactly: q = d directions a step make a coordinate-wise gradient descent. With fewer, a step moves q
    weights by d / q times their gradients; its mean over a sweep is the gradient all the same.

    The weight moves by sqrt(d) * eps in a query: for a step of h in it, eps = h / sqrt(d). A tied tensor moves once;
    embeddings, norms and biases are coordinates like any other. Meant for few weights: a pruned model, an adapter.

    Args:
        law: rademacher, the random sign of a direction (it matters to one-sided differences only).

    References: Chen et al. 2024 (DeepZero, arXiv 2310.02025), equation (3) (CGE), with differences from
    estimator=one_sided; its pruning is a matter of what is trained. Lian et al. 2016, for coordinates dealt at random.
    """

    keeps_choices: ClassVar[bool] = True
    laws: ClassVar[tuple[str, ...]] = ("rademacher",)

    law: str = "rademacher"

    def check(self) -> None:
        """Refuse a law: a direction is a coordinate and its sign."""
        self.require(self.law in self.laws, "law", "rademacher (a coordinate has a random sign, and no other law)")

    def check_with(self, method: Any) -> None:
        """Refuse what makes other directions than single coordinates."""
        estimator, optimizer = method.estimator, method.optimizer
        if estimator.across != "iid":
            raise UserError(
                f"estimator.across={estimator.across} has no meaning with subspace=coordinate, whose directions are at "
                "right angles as they are: leave it at iid"
            )
        if optimizer.shapes_directions:
            raise UserError(
                f"optimizer={optimizer.name()} shapes its directions, and those of subspace=coordinate are single "
                "weights: use subspace=full"
            )

    def bind(self, weights: Weights, noise: str = "counter") -> BoundCoordinate:
        """Coordinates are the tensors' own elements."""
        return BoundCoordinate(weights, self.source(weights, noise))

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """The order and the signs follow from the counter's keys."""
        super().source(weights, noise)  # refuses what is not the counter
        # keys alone: there is no tensor of random numbers to draw from
        return OneWeight(weights)


class OneWeight(NoiseSource):
    """A source of directions that are +-sqrt(d) in one place, and zero elsewhere.

    Example:
        >>> source = OneWeight(Weights(torch.nn.Linear(3, 1)))
        >>> sorted(source.place(Direction(0, 0, probe))[:2] for probe in range(4))
        [('bias', 0), ('weight', 0), ('weight', 1), ('weight', 2)]
    """

    def __init__(self, weights: Weights) -> None:
        self.sizes = weights.sizes()
        self.num_directions = 1
        # the trained tensors stand one behind the other: coordinate i is in the first whose end is beyond i
        self._ends = list(accumulate(self.sizes.values()))
        self._places: dict[Direction, tuple[str, int, float]] = {}  # of a step

    @property
    def dimension(self) -> int:
        """d."""
        return self._ends[-1]

    def arrange(self, num_directions: int, left_out: frozenset[str]) -> None:
        """Settle how many directions a step has, and which tensors stand still."""
        self._places.clear()
        self.num_directions = num_directions
        self.sizes = {name: size for name, size in self.sizes.items() if name not in left_out}
        self._ends = list(accumulate(self.sizes.values())) or [0]

    def place(self, direction: Direction) -> tuple[str, int, float]:
        """(tensor, flat place in it, z there)."""
        places = of_step(self._places, direction)
        if direction not in places:
            places[direction] = self._find(direction)
        return places[direction]

    def _find(self, direction: Direction) -> tuple[str, int, float]:
        # position in the run -> (sweep, turn in it): step t has turns q t to q t + q - 1
        position = direction.step * self.num_directions + direction.index
        sweep, turn = divmod(position, self.dimension)
        # one order a sweep, so that every weight has its turn once in d directions
        key = key_of(Direction(direction.seed, sweep), "", role="coordinate.order")
        index = permuted(turn, self.dimension, key)
        tensor = bisect_right(self._ends, index)
        # +-1 by one bit; the length is sqrt(d), as in the full space
        sign = 1.0 if _digest(key, "sign", index) & 1 else -1.0
        name = list(self.sizes)[tensor]
        return name, index - self._ends[tensor] + self.sizes[name], sign * self.dimension**0.5

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, flat, float32."""
        del dtype
        z = torch.zeros(stop - start, dtype=torch.float32, device=device)
        # zeros but for one element, which may lie outside of the piece
        where, at, value = self.place(direction)
        if where == name and start <= at < stop:
            z[at - start] = value
        return z

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices."""
        where, at, value = self.place(direction)
        # z at these places: zero, or +-sqrt(d) where the place is the coordinate's
        is_there = (indices == at) if where == name else torch.zeros_like(indices, dtype=torch.bool)
        return is_there.to(torch.float32).mul_(value)

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z``: one element, or none."""
        where, at, _ = self.place(direction)
        if where == name and start <= at < start + out.numel():
            super().add_(out[at - start : at - start + 1], direction, name, at, scale)

    def perturb(
        self,
        weight: Tensor,
        direction: Direction,
        name: str,
        start: int,
        scales: Sequence[float],
        outs: Sequence[Tensor],
    ) -> None:
        """``outs[i] = weight + scales[i] * z``: copies but for one element."""
        where, at, value = self.place(direction)
        here = slice(at - start, at - start + 1) if where == name and start <= at < start + weight.numel() else None
        z = torch.full((1,), value, dtype=torch.float32, device=weight.device)
        # a copy: one of the outputs may be the weight itself
        clean = weight[here].clone() if here else None
        for scale, out in zip(scales, outs, strict=True):
            if out.data_ptr() != weight.data_ptr():
                out.copy_(weight)
            if clean is not None:
                # through the same arithmetic as everywhere: losses are equal to the bit
                perturb_with(z, clean, [scale], [out[here]])


class BoundCoordinate(BoundSubspace):
    """The full space, in which directions are single coordinates."""

    def __init__(self, weights: Weights, source: NoiseSource) -> None:
        assert isinstance(source, OneWeight)
        super().__init__(weights, source)
        self.keeps = False  # a direction is one number: it is never kept as a tensor
        self.one = source

    def arrange(
        self,
        across: str = "iid",
        num_directions: int = 1,
        *,
        per_example: bool = False,
        mixes: bool = False,
        shape: Callable[[Tensor, str, slice | Tensor], Tensor] | None = None,
    ) -> None:
        """With q directions a step, step t has the coordinates q t to q t + q - 1 of the order."""
        self.one.arrange(num_directions, self.backprop_names)
        super().arrange(across, num_directions, per_example=per_example, mixes=mixes, shape=shape)

    def dimension(self, direction: Direction) -> int:
        """d: between them, the directions move every weight."""
        del direction
        return self.one.dimension

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether the tensor holds the weight that moves; of a sum, any of the weights."""
        return name not in self.backprop_names and any(self.one.place(part)[0] == name for part in _parts(direction))

    def gram(self, directions: Sequence[Direction]) -> Tensor:
        """d on the diagonal; off it, +-d where two directions of a step move the same weight, else 0."""
        # <z_i, z_j> = 0 for different coordinates, +-d for the same one
        places = [self.one.place(direction) for direction in directions]
        rows = [[a[2] * b[2] if a[:2] == b[:2] else 0.0 for b in places] for a in places]
        return torch.tensor(rows, dtype=torch.float64)


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed permutation of range(size) takes ``index``: a Feistel network of four rounds, walked to the end.

    The network permutes the 2 b-bit numbers for the least b with 4^b >= size; what falls outside of range(size) is
    sent through again, which ends since the way leads in a circle. No table is kept, whatever the size.

    Args:
        index: in range(size).
        size: at least 1.
        key: 64 bits.

    Returns:
        An int in range(size), a different one for each index.

    Example:
        >>> sorted(permuted(i, 5, key=1) for i in range(5))
        [0, 1, 2, 3, 4]

    References: Luby & Rackoff 1988; Black & Rogaway 2002 (Ciphers with arbitrary finite domains), cycle walking.
    """
    # 2 bits in two halves: the network works on 4^bits numbers, less than 4 times as many as there are
    bits = ((size - 1).bit_length() + 1) // 2
    low = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & low
        # (L, R) <- (R, L xor f(R)): a permutation whatever f is
        for turn in range(4):
            left, right = right, left ^ (_digest(key, turn, right) & low)
        index = left << bits | right
        # outside of range(size): once more through the same permutation (cycle walking)
        if index < size:
            return index


def _parts(direction: Direction) -> list[Direction]:
    return [part for part, _ in direction.mix] or [direction]


def _digest(key: int, role: int | str, value: int) -> int:
    """64 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(f"{key}|{role}|{value}".encode(), digest_size=8).digest(), "little")
