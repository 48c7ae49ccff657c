"""The probes of a step: their signal-to-noise, and the Gram matrix of their directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoft.diagnostics.gradient import Gradient, dot
from zoft.noise.direction import Direction
from zoft.subspaces.base import BoundSubspace


def signal(slopes: Tensor) -> dict[str, float | None]:
    """Mean, standard deviation and their ratio over probes.

    Args:
        slopes: the projected gradients of some probes at the same weights, [n].

    Returns:
        probe_mean; probe_rms = sqrt(mean p^2), which estimates |g| where E z z^T = I; probe_std (n - 1 in the
        denominator) and snr = |mean| / std, None for one probe or where all are equal.

    Example:
        >>> signal(torch.tensor([1.0, 3.0]))["snr"]
        1.414...

    References: the signal-to-noise ratio |mean| / std of probes, as a log line of every zeroth-order run, is what the
        position paper of zeroth-order fine-tuning asks for (P1, variance control).
    """
    wide = slopes.double().flatten()
    mean, rms = float(wide.mean()), float(wide.square().mean().sqrt())
    std = float(wide.std()) if len(wide) > 1 else None
    return {"probe_mean": mean, "probe_std": std, "probe_rms": rms, "snr": abs(mean) / std if std else None}


def gram_summary(gram: Tensor) -> dict[str, float | None]:
    """What a Gram matrix of directions says in two numbers.

    Args:
        gram: <z_i, z_j>, [n, n].

    Returns:
        gram_effective_rank = tr(G)^2 / |G|_F^2: n for orthogonal directions of one length, 1 for parallel ones;
        gram_offdiagonal: root mean square of the directions' cosines with each other (1 / sqrt(d) for independent ones
        in d dimensions), None for a single one.

    Example:
        >>> gram_summary(torch.eye(4) * 9)
        {'gram_effective_rank': 4.0, 'gram_offdiagonal': 0.0}
    """
    wide, count = gram.double(), len(gram)
    total = float(wide.square().sum())
    rank = float(wide.trace()) ** 2 / total if total else math.nan
    if count < 2:
        return {"gram_effective_rank": rank, "gram_offdiagonal": None}
    cosines = normalised(wide)
    off = cosines - torch.diag(cosines.diagonal())
    return {
        "gram_effective_rank": rank,
        "gram_offdiagonal": math.sqrt(float(off.square().sum()) / (count * (count - 1))),
    }


def normalised(gram: Tensor) -> Tensor:
    """The cosines between directions: <z_i, z_j> / |z_i| |z_j|; 0 for a direction that is zero."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    return gram * scale[:, None] * scale[None, :]


def true_slopes(coordinates: BoundSubspace, gradient: Gradient, directions: Sequence[Direction]) -> Tensor:
    """<g, z_j> over all weights, from the true gradient: float64 [n]."""
    totals = [0.0] * len(directions)
    for name, part in gradient.items():
        for index, direction in enumerate(directions):
            if coordinates.moves(direction, name):
                totals[index] += dot(coordinates.z(direction, name).reshape(-1).to(torch.float32), part)
    return torch.tensor(totals, dtype=torch.float64)
