"""The CP space: along a direction a matrix moves by U diag(tau) V^T, with U and V fixed for the whole run (TeZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import NoiseSource
from zoft.subspaces._factored import Bases, BoundFactored, Factored, MatrixLayout
from zoft.utils.lazy import Tensor, torch
from zoft.weights.tensors import Weights


@dataclass
class Cp(Factored):
    """Matrices move along z = s U diag(tau) V^T, with tau drawn for each direction, U and V once for the run.

    tau is [r], U [m, r] and V [n, r]. Optimizers work on tau: r numbers a matrix, and a run can change no more of it.

    The columns of U and V are Gaussian and of length 1, so that E||z||^2 = s^2 sum_k ||u_k||^2 ||v_k||^2 = m n with
    s = sqrt(m n / r), as in the full space: eps and the learning rate carry over from it. The mean estimate is
    s^2 sum_k <grad L, u_k v_k^T> u_k v_k^T. The paper has Gaussian U and V as they are, whose z is about sqrt(r) times
    as long, and chooses a rank for each layer from the spectrum of its weights; here all have one.

    Matrices with more than ``rank`` rows and columns move in the subspace, embeddings and heads among them; a tensor of
    more than two dimensions is taken as the matrix [shape[0], the rest]. Vectors (norms, biases) and smaller matrices
    move in full. A tied tensor is one tensor and moves once.

    References: Sun et al. 2025 (TeZO, arXiv 2501.19057), section 4.
    """

    has_matrices: ClassVar[bool] = False
    keeps_choices: ClassVar[bool] = True

    rank: int = 64

    def layout(self, rows: int, columns: int) -> MatrixLayout:
        """tau is [r]."""
        # E||z||^2 = s^2 sum_k E tau_k^2 = s^2 r for columns of length 1: s^2 = m n / r
        return MatrixLayout(rows, columns, (self.rank,), (rows * columns / self.rank) ** 0.5)

    def coordinates(self, weights: Weights, source: NoiseSource, layouts: dict[str, MatrixLayout]) -> BoundCp:
        """The subspace for these weights."""
        return BoundCp(weights, source, layouts, self.name())


class BoundCp(BoundFactored):
    """Coordinates of a matrix are tau.

    Example:
        >>> import torch
        >>> coordinates = Cp(rank=2).bind(Weights(torch.nn.Linear(5, 4)))
        >>> coordinates.shape("weight"), coordinates.shape("bias")
        ((2,), (4,))
    """

    def make_bases(self, refresh_period: Direction, name: str) -> Bases:
        """(U, V), columns of length 1."""
        layout, device = self.layouts[name], self.weights.tensors[name].device
        # two streams for the run: the period is that of interval = 0
        u, v = (key_of(refresh_period, name, role=f"cp.{side}") for side in "UV")
        return _unit_columns(u, layout.rows, layout.shape[0], device), _unit_columns(
            v, layout.columns, layout.shape[0], device
        )

    def left(self, direction: Direction, name: str, coordinates: Tensor, row: int, end: int) -> Tensor:
        """Rows [row, end) of s U diag(tau)."""
        u, _ = self.bases(direction, name)
        assert u is not None
        # s U diag(tau): column k of U times s tau_k
        return u[row:end] * (coordinates * self.layouts[name].scale)

    def products(self, direction: Direction, name: str, drawn: Tensor, start: int) -> Tensor:
        """s^2 tau_i^T K tau_j with K = (U^T U) o (V^T V): the columns are not at right angles."""
        if name not in self.layouts:
            return super().products(direction, name, drawn, start)
        u, v = (basis.double() for basis in self.bases(direction, name) if basis is not None)
        # <u_k v_k^T, u_l v_l^T> = (u_k . u_l)(v_k . v_l), element by element K = (U^T U) o (V^T V)
        return drawn.double() @ ((u.T @ u) * (v.T @ v)) @ drawn.double().T * self.layouts[name].scale ** 2


def _unit_columns(key: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Gaussian columns, each scaled to length 1: float32 [rows, columns], the same on every device."""
    gaussian = sample("gaussian", key, 0, rows * columns, "cpu").view(rows, columns).double()
    # in float64 on the CPU: a norm's last bits differ between devices
    return (gaussian / gaussian.norm(dim=0)).float().to(device)
