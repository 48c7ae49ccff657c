"""The left space: along a direction a matrix moves by P A, with A fresh and P kept for some steps (ZO-Muon)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._factored import Bases, BoundFactored, Factored, MatrixLayout
from zoft.subspaces._matrices import haar
from zoft.weights.tensors import Weights


@dataclass
class Left(Factored):
    """Matrices move along z = s P A, with A drawn for each direction and P orthonormal, kept for ``interval`` steps.

    A is [r, n], and P [m, r] Haar-distributed; all directions of a step share P. Optimizers work on A: the estimate is
    a gradient in miniature.

    The mean estimate is s^2 P P^T grad L with s = sqrt(m / r), for which E||z||^2 = m n as in the full space: eps and
    the learning rate carry over from it. The paper has s = 1: its eps is this one times s, and with sgd its learning
    rate this one times s^2. With muon, whose step has no scale, its learning rate is this one.

    Matrices with more than ``rank`` rows and columns move in the subspace, embeddings and heads among them; a tensor of
    more than two dimensions is taken as the matrix [shape[0], the rest]. Vectors (norms, biases) and smaller matrices
    move in full. A tied tensor is one tensor and moves once.

    Args:
        interval: steps that share one P, at least 1.

    References: Lang et al. 2026 (ZO-Muon, arXiv 2602.17155): rank 64, interval 100. Its published code draws P anew in
    every probe of a refresh step, so that the probes lie in different spaces and the step in the last one's; here P
    has a stream of its own.
    """

    changes_basis: ClassVar[bool] = True

    rank: int = 64
    interval: int = 100

    def check(self) -> None:
        """Refuse an unknown law, rank < 1 and interval < 1."""
        super().check()
        self.require(self.interval >= 1, "interval", "at least 1")

    def layout(self, rows: int, columns: int) -> MatrixLayout:
        """A is [r, n]; ||s P A||^2 = s^2 ||A||^2, whose mean is s^2 r n."""
        return MatrixLayout(rows, columns, (self.rank, columns), (rows / self.rank) ** 0.5)

    def coordinates(self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout]) -> BoundLeft:
        """The subspace for these weights."""
        return BoundLeft(weights, source, layouts, self.name(), self.interval)


class BoundLeft(BoundFactored):
    """Coordinates of a matrix are A, row by row.

    Example:
        >>> import torch
        >>> coordinates = Left(rank=2).bind(Weights(torch.nn.Linear(5, 4)))
        >>> coordinates.shape("weight"), coordinates.shape("bias")
        ((2, 5), (4,))
    """

    def make_bases(self, refresh_period: Direction, name: str) -> Bases:
        """(P, identity)."""
        layout = self.layouts[name]
        device = self.weights.tensors[name].device
        return haar(key_of(refresh_period, name, role="left.P"), layout.rows, layout.shape[0], device), None
