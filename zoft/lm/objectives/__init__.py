"""Objectives: batch -> one number to minimise; differentiable or not."""

from zoft.lm.objectives.base import Objective

__all__ = ["Objective"]
