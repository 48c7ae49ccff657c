"""The full space along directions of low rank: a matrix moves by A B^T, both drawn for every direction (EGGROLL)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

from zoft.noise import counter
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.joint import Antithetic, LinearCombination
from zoft.noise.source import CounterNoise, NoiseSource
from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)


@dataclass
class Outer(Subspace):
    """Matrices move along z = A B^T / sqrt(r), with A and B both drawn for each direction.

    A is [m, r] and B [n, r]. No subspace is kept: coordinates are the weights themselves, and a step of many directions
    is of full rank.

    The elements of z have mean 0, variance 1 and no correlation, so that E||z||^2 = m n, and the mean estimate is the
    gradient, as in the full space: eps and the learning rate carry over from it. law is that of the elements of A and
    B; with sphere they are Gaussian, and every tensor's z is scaled to the length sqrt(number of elements) exactly.

    Matrices with more than ``rank`` rows and columns move so, embeddings and heads among them; a tensor of more than
    two dimensions is taken as the matrix [shape[0], the rest]. Vectors (norms, biases) and smaller matrices move as in
    the full space. A tied tensor is one tensor and moves once.

    Args:
        rank: columns r of A and B, at least 1.

    References: Sarkar et al. 2025 (EGGROLL, arXiv 2511.16652): rank 1, antithetic pairs, z-scored losses.
    """

    rank: int = 1

    def check(self) -> None:
        """Refuse an unknown law and rank < 1."""
        super().check()
        self.require(self.rank >= 1, "rank", "at least 1")

    def bind(self, weights: Weights, noise: str = "counter") -> BoundOuter:
        """Coordinates are the tensors' own elements."""
        if not any(t.dim() >= 2 and min(_sides(t)) > self.rank for t in weights.tensors.values()):
            log.warning(
                "subspace=outer: no trained tensor has more than rank=%d rows and columns, so all of them move in "
                "full, as with subspace=full",
                self.rank,
            )
        return BoundOuter(weights, self.source(weights, noise))

    def source(self, weights: Weights, noise: str) -> NoiseSource:
        """Products of two factors, for what is large enough."""
        self.check_noise(noise)
        sizes = {
            name: _sides(tensor) for name, tensor in weights.tensors.items() if tensor.dim() >= 2 and tensor.numel()
        }
        # what is too small or no matrix is drawn like the full space
        return OuterNoise(
            self.law, weights.sizes(), {name: size for name, size in sizes.items() if min(size) > self.rank}, self.rank
        )


def _sides(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix."""
    return tensor.shape[0], tensor.numel() // max(1, tensor.shape[0])


class BoundOuter(BoundSubspace):
    """The full space, with what it knows of its directions' form.

    Example:
        >>> coordinates = Outer().bind(Weights(torch.nn.Linear(5, 4)))
        >>> a, b = coordinates.factors(Direction(0, 0), "weight")
        >>> torch.allclose(coordinates.z(Direction(0, 0), "weight"), a @ b.T)
        True
    """

    def factors(self, direction: Direction, name: str) -> tuple[Tensor, Tensor] | None:
        """(A / sqrt(r) [m, r], B [n, r]), float32, for a matrix of two dimensions, else None."""
        tensor = self.weights.tensors[name]
        return outer_factors(self.source, direction, name, tensor.device) if tensor.dim() == 2 else None


@dataclass
class OuterNoise(NoiseSource):
    """A B^T / sqrt(r) by counter: A and B have a stream each.

    Every element is made by the same r multiplications and r - 1 additions wherever it is asked for, each rounded by
    itself, so that its bits depend neither on the device nor on the piece.

    Args:
        law: of the elements of A and B, and of what is no matrix; ``sphere``: Gaussian, each tensor scaled to the
            length sqrt(number of elements).
        sizes: name -> number of elements of every tensor.
        matrices: name -> (m, n) of those that are products.
        rank: r.
    """

    law: str
    sizes: dict[str, int]
    matrices: dict[str, tuple[int, int]]
    rank: int = 1
    _scales: dict[tuple[Direction, str], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._bits = "gaussian" if self.law == "sphere" else self.law
        # what is no matrix, drawn under the same law
        self._plain = CounterNoise(self._bits, self.sizes)

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name``, flat, float32."""
        if name not in self.matrices:
            return self._plain.draw(direction, name, start, stop, device, dtype).mul_(self._scale(direction, name))
        n = self.matrices[name][1]
        # the rows that hold the elements; A's rows of these, and all of B
        row, end = start // n, -(-stop // n)
        left, right = self._left(direction, name, row, end, device), self._right(direction, name, device)
        # z_ik = sum_r a_ir b_kr / sqrt(r): r products and r - 1 sums, each rounded by itself
        z = left[:, :1] * right[0]
        for k in range(1, self.rank):
            z.add_(left[:, k : k + 1] * right[k])
        return z.view(-1)[start - row * n : stop - row * n]

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements at any flat indices: float32, of the shape and device of ``indices``."""
        scale = self._scale(direction, name)
        if name not in self.matrices:
            return self._plain.gather(direction, name, indices).mul_(scale)
        (m, n), r = self.matrices[name], self.rank
        keys = [key_of(direction, name, role=f"outer.{side}") for side in "AB"]
        # element i of the flat matrix: row i // n, column i mod n
        rows, columns, total = indices // n, indices % n, None
        for k in range(r):
            # B^T is [r, n] in its stream, so that column k of term r stands at k + r n
            left = counter.gather(self._bits, keys[0], rows * r + k, m * r).mul_(scale)
            term = left.mul_(counter.gather(self._bits, keys[1], columns + k * n, n * r))
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def factors(self, direction: Direction, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(A / sqrt(r) [m, r], B [n, r]); None for what is no matrix."""
        if name not in self.matrices:
            return None
        left = self._left(direction, name, 0, self.matrices[name][0], device)
        return left, self._right(direction, name, device).T.contiguous()

    def _left(self, direction: Direction, name: str, row: int, end: int, device: torch.device) -> Tensor:
        """Rows [row, end) of A times the scale: [end - row, r]."""
        # a stream for either factor: rows of A can be drawn without B
        key = key_of(direction, name, role="outer.A")
        drawn = sample(self._bits, key, row * self.rank, end * self.rank, device)
        return drawn.view(-1, self.rank).mul_(self._scale(direction, name))

    def _right(self, direction: Direction, name: str, device: torch.device) -> Tensor:
        """B^T: [r, n]."""
        key, size = key_of(direction, name, role="outer.B"), self.rank * self.matrices[name][1]
        return sample(self._bits, key, 0, size, device).view(self.rank, -1)

    def _scale(self, direction: Direction, name: str) -> float:
        """1 / sqrt(r), and on the sphere what makes the tensor's z exactly as long as it has elements."""
        plain = self.rank**-0.5 if name in self.matrices else 1.0
        if self.law != "sphere":
            return plain
        if self._scales and next(iter(self._scales))[0].step != direction.step:
            self._scales.clear()
        if (direction, name) not in self._scales:
            # sqrt(elements) / ||A B^T||
            self._scales[direction, name] = (self.sizes[name] / self._squares(direction, name)) ** 0.5
        return self._scales[direction, name]

    def _squares(self, direction: Direction, name: str) -> float:
        """||A B^T||^2 = sum (A^T A) o (B^T B), computed on the CPU for all devices; ||z||^2 of what is no matrix."""
        if name not in self.matrices:
            return counter.squared_norm(key_of(direction, name), self.sizes[name], "cpu") / counter.FIXED_POINT**2
        m, n = self.matrices[name]
        keys = [key_of(direction, name, role=f"outer.{side}") for side in "AB"]
        a = sample(self._bits, keys[0], 0, m * self.rank, "cpu").view(m, self.rank).double()
        b = sample(self._bits, keys[1], 0, n * self.rank, "cpu").view(self.rank, n).double()
        # ||A B^T||^2 = sum_kl (A^T A)_kl (B^T B)_kl: r x r numbers instead of m x n
        return float(((a.T @ a) * (b @ b.T)).sum())


def outer_factors(
    source: NoiseSource, direction: Direction, name: str, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """(left [m, r], right [n, r]) of a direction that is a product; None where other laws have made it something else.

    Args:
        source: an :class:`OuterNoise`, or a law around one.
        direction: which.
        name: which tensor of it.
        device: where the factors are wanted.
    """
    if isinstance(source, LinearCombination) and not direction.mix:
        return outer_factors(source.inner, direction, name, device)
    # an odd direction is the opposite of its pair: -A B^T
    if isinstance(source, Antithetic):
        pair = outer_factors(source.inner, replace(direction, index=direction.index // 2), name, device)
        return (pair[0].neg_(), pair[1]) if pair is not None and direction.index % 2 else pair
    return source.factors(direction, name, device) if isinstance(source, OuterNoise) else None


def outer_noise(law: str, weights: Weights, shapes: dict[str, tuple[int, ...]]) -> OuterNoise:
    """Products of two vectors for the coordinates of these shapes, for all other tensors the full space's numbers."""
    matrices = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}
    return OuterNoise(law, weights.sizes() | {name: m * n for name, (m, n) in matrices.items()}, matrices)
