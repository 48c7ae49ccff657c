"""Weightings: how the slopes along a step's directions become the coefficients of its estimate."""

from zoft.weightings.base import Weighting

__all__ = ["Weighting"]
