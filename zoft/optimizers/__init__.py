"""Optimizers: what step to take from the estimate, in the subspace's own coordinates."""

from zoft.optimizers.base import Optimizer

__all__ = ["Optimizer"]
