"""The mean over the directions: the unbiased estimate."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor
from zoft.weightings.base import Gram, Weighting


@dataclass
class Mean(Weighting):
    """a_j = p_j / q: every direction counts alike, and the estimate is as unbiased as its slopes p_j are.

    Example:
        >>> import torch
        >>> measured = Measured(torch.tensor([1.0, 3.0]), torch.tensor(0.5), torch.empty(2, 0))
        >>> Mean().coefficients(measured, lambda: torch.eye(2), {})
        tensor([0.5000, 1.5000])

    References: Malladi et al. 2023 (MeZO), Algorithm 2.
    """

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """p / q."""
        del gram, state
        # a_j = p_j / q
        return measured.projected_grads / len(measured.projected_grads)
