"""Steps whose singular values are all one: the matrix sign of the estimate (ZO-Muon, ZO-MOPI)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.errors import Conditions, UserError
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.optimizers.base import Estimate, Optimizer, State
from zoft.utils.lazy import Tensor, torch

METHODS = ("newton_schulz", "svd", "power")
"""How the matrix sign is made: an iteration to about one, exactly, or of the largest singular directions alone."""

_QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5: takes (0, 1] to about [0.7, 1.2] in five rounds
_ROUNDS = 5
_TINY = 1e-30  # in place of a length of zero


@dataclass
class Muon(Optimizer):
    """msign(C) = U V^T for the coordinates C = U S V^T of a matrix: all singular directions move by the same length.

    In the weights the step of a matrix is lr * lift(msign(C)) / gain: for an orthonormal basis P it is lr P msign(C),
    whatever scale the subspace gives its directions. Works on a whole matrix at a time, tensors of more than two
    dimensions as [shape[0], the rest]. With beta > 0, C is a running mean of the estimates (one float32 number per
    coordinate of a matrix), which is carried over when the subspace changes its basis.

    Vectors (norms, biases) have no singular directions: they move by vector_scale times the estimate, as with SGD.

    method=power keeps V [columns, k], and takes one round of power iteration a step from the one before:
    V <- QR(C^T (C V)), U <- columns of C V over their lengths, step U V^T of rank k. The first V is random, the same in
    every run; it is not carried over to a new basis, from where the iteration finds its way again. The other
    directions, where noise is most of the estimate, stand still.

    Args:
        method: newton_schulz (five rounds of the quintic, singular values of about 0.7 ... 1.2), svd (exact), or power
            (the top_k largest, ZO-MOPI).
        top_k: singular directions of method=power, at least 1; a matrix with fewer has them all.
        beta: weight of the past in the running mean, in [0, 1); 0 keeps none.
        vector_scale: multiplies the learning rate of vectors, > 0; the published 1e-7 beside 1e-2 is 1e-5.

    References: Lang et al. 2026 (ZO-Muon, arXiv 2602.17155); ZO-MOPI (2026, arXiv 2605.09034); Jordan et al. 2024
    (Muon) for the quintic.
    """

    per_matrix: ClassVar[bool] = True
    linear_state: ClassVar[tuple[str, ...]] = ("momentum",)
    counts_with: ClassVar[Conditions] = {"top_k": ("method", ("power",))}

    method: str = "newton_schulz"
    top_k: int = 32
    beta: float = 0.0
    vector_scale: float = 1e-5

    def check(self) -> None:
        """Refuse an unknown method, no directions, and scales that cannot be."""
        super().check()
        self.require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        self.require(self.top_k >= 1, "top_k", "at least 1")
        self.require(0 <= self.beta < 1, "beta", "in [0, 1)")
        self.require(0 < self.vector_scale < float("inf"), "vector_scale", "> 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse a subspace in which a matrix has no matrix of coordinates."""
        # the matrix sign is of singular directions, which a vector of coordinates has not
        if not method.subspace.has_matrices:
            raise UserError(
                f"optimizer=muon works on matrices of coordinates, and those of subspace={method.subspace.name()} are "
                "vectors: use subspace=left, or optimizer=adam"
            )

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The running mean where there is one, and V."""
        # vectors have no state: they move as with SGD
        if len(shape) < 2 or not all(shape):
            return {}
        rows, columns = _sides(shape)
        shapes = {"momentum": shape} if self.beta else {}
        return shapes | ({"V": (columns, min(self.top_k, rows, columns))} if self.method == "power" else {})

    def update_from(self, estimate: Estimate, state: State, step: int) -> Tensor:
        """msign of the (running mean of the) estimate, in units of the weights."""
        gradient = estimate.gradient()
        shape = estimate.shape
        if len(shape) < 2 or not gradient.numel():
            # vector_scale * g
            return gradient.mul_(self.vector_scale)
        matrix = gradient.view(_sides(shape))
        if self.beta:
            mean = state["momentum"].view(matrix.shape)
            # M <- beta M + (1 - beta) C
            matrix = mean.mul_(self.beta).add_(matrix, alpha=1 - self.beta)
        if self.method == "power":
            # tensors begin at different steps: each draws its first basis at its own first update
            if step == 1:
                state["V"].copy_(_first_basis(estimate.name, state["V"]))
            sign = power_step(matrix, state["V"])
        else:
            sign = newton_schulz(matrix) if self.method == "newton_schulz" else exact(matrix)
        # the lift multiplies by the gain of the basis, which a step of fixed length must not see
        return sign.contiguous().div_(estimate.coordinates.gain(estimate.name))


def newton_schulz(matrix: Tensor) -> Tensor:
    """About U V^T: an odd polynomial of the matrix, five times, from one of Frobenius norm 1.

    X <- a X + b (X X^T) X + c (X X^T)^2 X acts on the singular values alone.
    """
    a, b, c = _QUINTIC
    # singular values into (0, 1], where the quintic converges: the Frobenius norm bounds the largest
    x = matrix / torch.linalg.vector_norm(matrix).clamp_min(_TINY)
    # X X^T of the shorter side
    tall = x.shape[0] > x.shape[1]
    # the shorter side's Gram matrix is the smaller one, and msign(C^T) = msign(C)^T
    x = x.T if tall else x
    for _ in range(_ROUNDS):
        square = x @ x.T
        # X <- a X + b (X X^T) X + c (X X^T)^2 X, which maps each singular value s to a s + b s^3 + c s^5
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def exact(matrix: Tensor) -> Tensor:
    """U V^T over the singular values that are not zero."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # values below it are rounding errors of a matrix of lower rank: their directions mean nothing
    smallest = values[:1] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    # U V^T over the singular values that count
    return (left * (values > smallest)) @ right


def power_step(matrix: Tensor, basis: Tensor) -> Tensor:
    """U V^T of the largest singular directions, after one round of power iteration.

    Args:
        matrix: M [a, b].
        basis: V [b, k], the last one; overwritten with the new one.

    Returns:
        U V^T [a, b]; 0 for a matrix of zeros, whose V stays.
    """
    size = torch.linalg.vector_norm(matrix)
    scaled = matrix / size.clamp_min(_TINY)  # squares of a small estimate would leave float32
    # V <- QR(C^T (C V))
    moved = torch.linalg.qr(scaled.T @ (scaled @ basis)).Q
    basis.copy_(torch.where(size > 0, moved, basis))
    # U = columns of C V over their lengths; the step is U V^T
    left = scaled @ basis
    lengths = torch.linalg.vector_norm(left, dim=0)
    is_alive = lengths > 10 * torch.finfo(matrix.dtype).eps  # the others are rounding errors of a matrix of lower rank
    return (left / lengths.clamp_min(_TINY) * is_alive) @ basis.T


def _first_basis(name: str, like: Tensor) -> Tensor:
    """Orthonormal columns, from a stream of this tensor's own."""
    # a stream by the tensor's name alone: V begins the same in every run
    drawn = sample("gaussian", key_of(Direction(0, 0), name, role="muon.V"), 0, like.numel(), like.device)
    return torch.linalg.qr(drawn.view(like.shape)).Q


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    columns = 1
    for side in shape[1:]:
        columns *= side
    return shape[0], columns
