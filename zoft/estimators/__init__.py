"""Estimators: at which points to query the objective, and how the losses become one coefficient per direction."""

from zoft.estimators.base import Estimator, FiniteDifference, Measured, Point

__all__ = ["Estimator", "FiniteDifference", "Measured", "Point"]
