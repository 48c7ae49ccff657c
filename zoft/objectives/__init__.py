"""Objectives: batch -> one number to minimise; differentiable or not."""

from zoft.objectives.base import Objective

__all__ = ["Objective"]
