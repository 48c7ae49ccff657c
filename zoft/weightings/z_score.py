"""Losses as z-scores: evolution strategies' fitness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings._spread import refuse_one_loss, refuse_other_rows, rms
from zoft.weightings.base import Gram, Weighting, by_direction


@dataclass
class ZScore(Weighting):
    """a_j = s_j / q with s = (L - mean) / std over all perturbed losses of the step; eps has no part in it.

    With two sides a_j = (s+_j - s-_j) / 2 / q, mean and deviation over all 2 q losses. Exact slopes are taken as the
    limit of two sides: a_j = p_j / (q rms(p)). The step is as long as for a gradient of length one, so a published
    learning rate of evolution strategies, which has 1 / sigma in it, is taken as it is.

    Args:
        floor: smallest standard deviation that is believed, in units of the loss, >= 0: below it nothing moves.

    References: Salimans et al. 2017; Qiu et al. 2025 (ES at scale, arXiv 2509.24372), Algorithm 2; Sarkar et al. 2025
    (EGGROLL, arXiv 2511.16652), which multiplies by sqrt(population) besides.
    """

    floor: float = 1e-6

    def check(self) -> None:
        """Refuse a negative floor."""
        self.require(0 <= self.floor < float("inf"), "floor", ">= 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse losses that are not of the same rows."""
        refuse_one_loss(self, method)
        refuse_other_rows(self, method)

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """The scores, or half the difference of a pair's, over q."""
        del gram, state
        slopes, losses = measured.projected_grads, measured.losses
        # L - mean over all losses of the step; slopes p_j as they are where no losses were asked for
        centred = losses - losses.mean() if losses.shape[1] else slopes.unsqueeze(1)
        deviation = rms(centred)
        # all losses are alike: no score
        if float(deviation) <= self.floor:
            return torch.zeros_like(slopes)
        scores = centred / deviation  # [Q, S]
        return by_direction(scores) / len(slopes)
