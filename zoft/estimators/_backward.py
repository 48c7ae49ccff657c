"""What estimators with a backward pass cannot go together with."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.estimators.base import Estimator


def check_parts(estimator: Estimator, method: Any) -> None:
    """Refuse subspaces and optimizers that know directions only.

    Args:
        estimator: with a backward pass.
        method: a :class:`zoft.step.method.Method`.
    """
    subspace, optimizer = method.subspace, method.optimizer
    reason = f"estimator={estimator.name()} takes gradients from a backward pass, and "
    if subspace.name() != "full":
        raise UserError(f"{reason}subspace={subspace.name()} has no coordinates for them: use subspace=full")
    if optimizer.line_search:
        raise UserError(f"{reason}optimizer={optimizer.name()} tries steps along directions: use optimizer=sgd")
    if optimizer.shapes_directions:
        raise UserError(f"{reason}optimizer={optimizer.name()} shapes the directions of queries: use optimizer=sgd")
    if optimizer.history_length or type(optimizer).coefficients.__qualname__ != "Optimizer.coefficients":
        raise UserError(
            f"{reason}optimizer={optimizer.name()} goes by the directions' coefficients: use optimizer=adam"
        )
