"""The interface of estimators that measure curvature along their directions, and the check of parts that need it."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor


class MeasuresCurvature:
    """An estimator whose losses give second differences besides slopes (:attr:`zoft.estimators.base.Measured`)."""

    def curvatures(self, losses: Tensor) -> Tensor:
        """z^T H z along each direction, float32 [Q].

        Args:
            losses: the objective at the estimator's points, float32 [P].
        """
        raise NotImplementedError


def require_curvature(part: str, method: Any) -> None:
    """Refuse an estimator that measures none.

    Args:
        part: what needs it, as ``group=name``.
        method: a :class:`zoft.step.method.Method`.
    """
    if not isinstance(method.estimator, MeasuresCurvature):
        raise UserError(
            f"{part} needs the curvature along the directions, and estimator={method.estimator.name()} does not "
            "measure it: use estimator=three_point"
        )
