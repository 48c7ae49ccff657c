"""The two-sided space: along a direction a matrix moves by U C V^T, with a small C between kept bases (SubZero)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._factored import Bases, BoundFactored, Factored, MatrixLayout
from zoft.subspaces._matrices import haar
from zoft.weights.tensors import Weights

_LONG = 16  # times longer than wide: an adapter's or a prefix's matrix
_NARROW = 256  # columns (or rows) below which such a matrix is reshaped; embeddings have more


@dataclass
class TwoSided(Factored):
    """Matrices move along z = s U C V^T, with a small C drawn for each direction between orthonormal U and V.

    C is [r, r]; U [m, r] and V [n, r] are Haar-distributed and kept for ``interval`` steps; all directions of a step
    share them. Optimizers work on C: each of their state tensors is r^2 numbers a matrix.

    The mean estimate is s^2 U U^T grad L V V^T with s = sqrt(m n) / r, for which E||z||^2 = m n as in the full space:
    eps and the learning rate carry over from it.

    Matrices with more than ``rank`` rows and columns move in the subspace, embeddings and heads among them; a tensor of
    more than two dimensions is taken as the matrix [shape[0], the rest]. Vectors (norms, biases) and smaller matrices
    move in full. A tied tensor is one tensor and moves once.

    Args:
        interval: steps that share U and V, at least 1.
        reshape: take long and narrow matrices (one side below 256, the other at least 16 times as long: those of
            adapters and prefixes) as nearly square ones of the same elements in the same order: m is the largest
            divisor of the number of elements that is at most its root.

    References: Yu et al. 2024 (SubZero, arXiv 2410.08989), Algorithm 1 and the reshaping of adapters; rank 128 for
    models of 8B to 13B, 16 for 1.3B, 4 to 16 for LoRA, interval 500 to 2000. SubZero+ (arXiv 2608.15665): the sign that
    makes bases Haar-distributed, many directions, Adam on C.
    """

    changes_basis: ClassVar[bool] = True

    rank: int = 128
    interval: int = 1000
    reshape: bool = True

    def check(self) -> None:
        """Refuse an unknown law, rank < 1 and interval < 1."""
        super().check()
        self.require(self.interval >= 1, "interval", "at least 1")

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """[shape[0], the rest], or nearly square."""
        size = super().matrix(shape)
        # an adapter's 8 x 4096 would move in full beside a rank of 8; the same numbers as 128 x 256 do not
        if self.reshape and size is not None and 0 < min(size) < _NARROW and max(size) >= _LONG * min(size):
            return near_square(math.prod(size))
        return size

    def layout(self, rows: int, columns: int) -> MatrixLayout:
        """C is [r, r]; ||s U C V^T||^2 = s^2 ||C||^2, whose mean is s^2 r^2."""
        # s^2 r^2 = m n: E||z||^2 = m n
        return MatrixLayout(rows, columns, (self.rank, self.rank), (rows * columns) ** 0.5 / self.rank)

    def coordinates(self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout]) -> BoundTwoSided:
        """The subspace for these weights."""
        return BoundTwoSided(weights, source, layouts, self.name(), self.interval)


class BoundTwoSided(BoundFactored):
    """Coordinates of a matrix are C, row by row.

    Example:
        >>> import torch
        >>> coordinates = TwoSided(rank=2).bind(Weights(torch.nn.Linear(5, 4)))
        >>> coordinates.shape("weight"), coordinates.shape("bias")
        ((2, 2), (4,))
    """

    def make_bases(self, refresh_period: Direction, name: str) -> Bases:
        """(U, V)."""
        layout = self.layouts[name]
        # a stream for either side and every period: the same bases wherever they are asked for
        device = self.weights.tensors[name].device
        return (
            haar(key_of(refresh_period, name, role="two_sided.U"), layout.rows, layout.shape[0], device),
            haar(key_of(refresh_period, name, role="two_sided.V"), layout.columns, layout.shape[1], device),
        )


def near_square(count: int) -> tuple[int, int]:
    """The factors of a number that are nearest to each other, the smaller first.

    Example:
        >>> near_square(8 * 4096)
        (128, 256)
    """
    # the largest divisor up to the root, so that the other one is the smallest above it
    first = next(i for i in range(math.isqrt(count), 0, -1) if count % i == 0)
    return first, count // first
