"""The full space: every trainable weight is its own coordinate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.subspaces.base import BoundSubspace, Subspace
from zoft.weights.tensors import Weights


@dataclass
class Full(Subspace):
    """Every trainable weight moves; a direction is one random number a weight.

    References: Malladi et al. 2023 (MeZO) for Gaussian directions; Spall 1992 (SPSA) for Rademacher ones.
    """

    serves_sequential: ClassVar[bool] = True

    def bind(self, weights: Weights, noise: str = "counter") -> BoundSubspace:
        """Coordinates are the tensors' own elements."""
        return BoundSubspace(weights, self.source(weights, noise))
