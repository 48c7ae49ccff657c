"""An estimate compared with the true gradient: cosine and length, and what both would be by chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoft.diagnostics.gradient import Gradient, dot
from zoft.optimizers.base import Estimate, Term
from zoft.subspaces.base import BoundSubspace


@dataclass(frozen=True)
class Alignment:
    """An estimate beside a gradient.

    Args:
        estimate_norm: |ghat|, over all trained weights.
        gradient_norm: |g|; None where there is none.
        cosine: <ghat, g> / |ghat| |g|; None where there is no gradient, NaN where either is zero.
    """

    estimate_norm: float
    gradient_norm: float | None = None
    cosine: float | None = None

    @property
    def norm_ratio(self) -> float | None:
        """|ghat| / |g|."""
        return self.estimate_norm / self.gradient_norm if self.gradient_norm else None


def alignment(
    coordinates: BoundSubspace, terms: Sequence[Term], dense: Gradient | None = None, gradient: Gradient | None = None
) -> Alignment:
    """Compare the estimate in the weights with the gradient, one tensor at a time.

    Args:
        coordinates: the subspace, in the middle of the step.
        terms: directions and coefficients, as the optimizer is handed them.
        dense: what a backward pass adds to them.
        gradient: the true one.
    """
    squares, product = 0.0, 0.0
    for name in coordinates.weights.tensors:
        estimate = lifted(coordinates, name, terms, None if dense is None else dense.get(name))
        if estimate is None:
            continue
        squares += dot(estimate, estimate)
        if gradient is not None and name in gradient:
            product += dot(estimate, gradient[name])
    if gradient is None:
        return Alignment(math.sqrt(squares))
    length = math.sqrt(sum(dot(part, part) for part in gradient.values()))
    both = math.sqrt(squares) * length
    return Alignment(math.sqrt(squares), length, product / both if both else math.nan)


def lifted(coordinates: BoundSubspace, name: str, terms: Sequence[Term], dense: Tensor | None = None) -> Tensor | None:
    """The estimate in the weights of one tensor, made as a step is written: None where it does not move.

    Args:
        coordinates: the subspace.
        name: the tensor.
        terms: directions and coefficients.
        dense: what a backward pass adds.

    Returns:
        float32, flat: what ``optimizer=sgd`` with learning rate 1 and no decay would subtract.
    """
    moving = [term for term in terms if coordinates.moves(term[0], name)]
    if not moving:
        return None if dense is None else dense
    total = torch.zeros(coordinates.weights.tensors[name].numel(), device=coordinates.weights.tensors[name].device)
    for start, stop in coordinates.chunks(name):
        piece = None if dense is None else dense[start:stop]
        gradient = Estimate(coordinates, name, start, stop, moving, dense=piece).gradient().view(-1)
        for first, last in coordinates.pieces(name, start, stop):
            total[first:last] += coordinates.lift(terms[0][0], name, gradient, start, first, last)
    return total


def cosine_by_chance(num_directions: int, dimension: int) -> float:
    """sqrt(q / d): what a projection on q random directions of d has on average (of its square), at most 1.

    Example:
        >>> cosine_by_chance(4, 400)
        0.1
    """
    return math.sqrt(min(1.0, num_directions / dimension)) if dimension else math.nan
