"""The variance of an estimate against q: its mean square over groups of probes, and what theory says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from zoft.noise.direction import Direction
from zoft.optimizers.base import Term

Make = Callable[[Sequence[Direction]], "list[Term] | None"]
"""Directions -> the estimate that the method makes of them; None where a loss is not finite."""


@dataclass(frozen=True)
class Law:
    """What theory needs of the directions.

    Args:
        across: gaussian (independent, fourth moment 3), length (independent, all of the length sqrt(D): signs, the
            sphere), or orthogonal (at right angles, of that length).
        dimension: k, how many coordinates move.
        square: D = E|z|^2 in the weights.
        slope_square: E p^2 of one exact slope; |g|^2 in the full space.
        pairs: whether directions come in pairs z, -z, of which one is as good as both.
    """

    across: str
    dimension: int
    square: float
    slope_square: float
    pairs: bool = False

    def mean_square(self, num_directions: int) -> float:
        """E|ghat|^2 of the mean of q p_j z_j with exact slopes p_j = <g, z_j>.

        One direction has A = E p^2 |z|^2, two independent ones have <E p z, E p z> = |E ghat|^2 = B between them, so
        the mean of q has A / q + (1 - 1 / q) B. In the full space (k = D = d, E p^2 = |g|^2): B = |g|^2, and A is
        (d + 2) |g|^2 for Gaussian directions, d |g|^2 for those of the length sqrt(d); at right angles nothing is
        between them. In a subspace of k coordinates with an orthonormal basis of one gain both are D / k times as
        much, with k in place of d.

        Example:
            >>> Law("gaussian", 10, 10.0, 1.0).mean_square(1), Law("orthogonal", 10, 10.0, 1.0).mean_square(10)
            (12.0, 1.0)

        References: (d + q + 1) / q |g|^2, Nesterov & Spokoiny 2017, Lemma 1 for the fourth moment; (d + q - 1) / q
            |g|^2, Malladi et al. 2023 (MeZO), Lemma 2; docs/mathematics.md, 3.1 and 3.2.
        """
        gain = self.square / self.dimension * self.slope_square
        q = num_directions / 2 if self.pairs else num_directions
        if self.across == "orthogonal":
            return gain * self.dimension / q
        one = self.dimension + (2 if self.across == "gaussian" else 0)
        return gain * (one + q - 1) / q


class VarianceRow(TypedDict, total=False):
    """Estimates of q directions: of the variance table, one row.

    Args:
        num_directions: q.
        num_groups: estimates that were made.
        mean_square: E|ghat|^2.
        standard_error: of that; None for one group.
        variance: E|ghat - g|^2, where g is known.
        cosine_square: E cos^2 of ghat and g, where g is known.
        theory: what E|ghat|^2 should be; None where there is no line of theory.
    """

    num_directions: int
    num_groups: int
    mean_square: float
    standard_error: float | None
    variance: float
    cosine_square: float
    theory: float | None


def variance_table(
    directions: Sequence[Direction],
    make: Make,
    gram: Callable[[Sequence[Direction]], Tensor],
    sizes: Sequence[int],
    slopes: Callable[[Sequence[Direction]], Tensor] | None = None,
    gradient_norm: float | None = None,
    law: Law | None = None,
) -> list[VarianceRow]:
    """Estimates of q directions, for several q, from the same probes at the same weights.

    Nothing tensor-sized is made: |sum a_j z_j|^2 = a^T G a and <g, ghat> = sum a_j <g, z_j>.

    Args:
        directions: of the probes, [n].
        make: the method.
        gram: directions -> their inner products, float64.
        sizes: the numbers q.
        slopes: directions -> <g, z_j>, where the true gradient is known.
        gradient_norm: |g|, where it is known.
        law: for the line of theory, where there is one.

    Returns:
        One row a q.
    """
    estimates = {q: [terms for group in _groups(directions, q) if (terms := make(group)) is not None] for q in sizes}
    named = list(dict.fromkeys(d for groups in estimates.values() for terms in groups for d, _ in terms))
    if not named:
        return []
    index = {direction: i for i, direction in enumerate(named)}
    products = gram(named)
    along = None if slopes is None else slopes(named)
    rows = []
    for q, groups in estimates.items():
        vectors = torch.zeros(len(groups), len(named), dtype=torch.float64)
        for group, terms in enumerate(groups):
            for direction, coefficient in terms:
                vectors[group, index[direction]] += coefficient
        if groups:
            row = _row(q, vectors, products, along, gradient_norm)
            row["theory"] = None if law is None else law.mean_square(q)
            rows.append(row)
    return rows


def _row(q: int, vectors: Tensor, gram: Tensor, along: Tensor | None, gradient_norm: float | None) -> VarianceRow:
    squares = ((vectors @ gram) * vectors).sum(1).clamp_min(0)
    count = len(squares)
    row: VarianceRow = {
        "num_directions": q,
        "num_groups": count,
        "mean_square": float(squares.mean()),
        "standard_error": float(squares.std()) / math.sqrt(count) if count > 1 else None,
    }
    if along is not None and gradient_norm:
        product = vectors @ along
        row["variance"] = float((squares - 2 * product).mean()) + gradient_norm**2
        cosines = torch.where(squares > 0, product**2 / squares, torch.zeros_like(squares)) / gradient_norm**2
        row["cosine_square"] = float(cosines.mean())
    return row


def _groups(directions: Sequence[Direction], size: int) -> list[Sequence[Direction]]:
    """Consecutive groups of ``size``; a remainder that is smaller is left out."""
    return [directions[start : start + size] for start in range(0, len(directions) - size + 1, size)]
