"""Finite differences against the exact derivative as eps varies: too small is rounding, too large is curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import Estimator, FiniteDifference, Point
from zoft.estimators.central import Central
from zoft.estimators.per_example import PerExample
from zoft.noise.direction import Direction


def exact_slopes(session: Session, batch: Any, directions: Sequence[Direction]) -> Tensor | None:
    """z^T grad L by one forward-mode pass a direction, float32 [n]; None where an operation has no such derivative."""
    try:
        return session.losses(batch, [Point(direction, derivative=True) for direction in directions])
    except (RuntimeError, NotImplementedError, UserError):  # no such operation, no memory for it, no derivative at all
        return None


def differences(
    session: Session, batch: Any, directions: Sequence[Direction], estimator: Estimator, eps: float
) -> Tensor:
    """The slopes that the estimator's formula gives at another radius; central differences where it has no slopes."""
    applies = isinstance(estimator, FiniteDifference) and estimator.measures_slopes
    applies = applies and not isinstance(estimator, (PerExample, KeepsAnchor)) and not estimator.backpropagates
    like = estimator if applies else Central()
    chosen = replace(like, num_directions=len(directions), eps=eps, across="iid")  # type: ignore[call-arg]
    return chosen.projected_grads(session.losses(batch, chosen.points(list(directions))))


def radius_table(
    session: Session,
    batch: Any,
    directions: Sequence[Direction],
    estimator: Estimator,
    exact: Tensor,
    radii: Sequence[float],
) -> list[dict[str, float]]:
    """The relative error of finite differences at each eps.

    Args:
        session: asks the objective.
        batch: handed to it.
        directions: some of the step's, [n].
        estimator: says which differences.
        exact: the derivatives along them, [n].
        radii: values of eps, in units of the weights.

    Returns:
        One row an eps: eps, and error = sqrt(sum_j (fd_j - s_j)^2 / sum_j s_j^2).
    """
    exact = exact.double()
    rows = []
    for eps in sorted(set(radii)):
        off = differences(session, batch, directions, estimator, eps).double() - exact
        rows.append({"eps": eps, "error": float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(exact))})
    return rows
