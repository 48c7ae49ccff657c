"""Losses as centred ranks: evolution strategies' fitness shaping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings._spread import refuse_one_loss, refuse_other_rows
from zoft.weightings.base import Gram, Weighting, by_direction


@dataclass
class Ranks(Weighting):
    """a_j = r_j / q, with r the losses' ranks set evenly in [-1/2, 1/2]: how far apart losses lie has no part in it.

    With n perturbed losses in the step, r = rank / (n - 1) - 1/2, ranks from 0 for the lowest loss; equal losses share
    the mean of their ranks, so that a step whose losses are all equal moves nothing. One side ranks q losses; two sides
    rank all 2 q, and a_j = (r+_j - r-_j) / 2 / q. Exact slopes are taken as the limit of two sides, p_j and -p_j.

    One reward that is far off counts as much as one that is just the best. eps has no part in it, and the spread of r
    is 0.29 (1 / sqrt(12)) where that of ``z_score`` is 1: a learning rate that fits the one is 3.5 times that of the
    other.

    References: Salimans et al. 2017 (Evolution strategies as a scalable alternative), section 2.1, which takes the
    transformation from Wierstra et al. 2014 (Natural evolution strategies), section 3.1.
    """

    def check_with(self, method: Any) -> None:
        """Refuse one loss, and losses that are not of the same rows."""
        refuse_one_loss(self, method, "ranks the losses")
        refuse_other_rows(self, method)

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """The ranks, or half the difference of a pair's, over q."""
        del gram, state
        slopes, losses = measured.projected_grads, measured.losses
        if not losses.shape[1]:  # L(theta +- h z_j) for h to 0
            losses = torch.stack((slopes, -slopes), dim=1)
        ranks = centred_ranks(losses.reshape(-1)).view(losses.shape)  # [Q, S]
        return (by_direction(ranks) / len(slopes)).to(slopes.dtype)


def centred_ranks(values: Tensor) -> Tensor:
    """Ranks of n numbers, evenly in [-1/2, 1/2] from the lowest to the highest; equal ones share their mean.

    Args:
        values: [N], N >= 2; a NaN among them makes all ranks NaN.

    Returns:
        float64 [N].

    Example:
        >>> import torch
        >>> centred_ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist()
        [0.0, -0.5, 0.0, 0.5]
    """
    if bool(values.isnan().any()):
        return torch.full_like(values, torch.nan, dtype=torch.float64)
    # (how many are lower + half of those that are equal, itself left out) / (n - 1) - 1/2
    lower = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1) - 1
    return (lower + equal / 2).double() / (len(values) - 1) - 0.5
