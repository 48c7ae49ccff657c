"""Optimizers: what step to take from the estimate, in the subspace's own coordinates."""

from zoft.optimizers.base import Estimate, Optimizer

__all__ = ["Estimate", "Optimizer"]
