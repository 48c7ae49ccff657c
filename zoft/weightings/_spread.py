"""The spread of a step's losses around their mean, for directions that were queried on one side or on both."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.estimators.base import Measured
from zoft.estimators.per_example import PerExample
from zoft.utils.lazy import Tensor


def refuse_one_loss(weighting: Any, method: Any, does: str = "divides by the spread of the losses") -> None:
    """Refuse a single direction asked for on one side: one loss has no spread."""
    # step 1, and not 0, in which svrg makes an anchor and asks at other points
    estimator = method.estimator
    points = [] if estimator.backpropagates else estimator.points(estimator.directions(0, 1))
    losses = [p for p in points if p.direction is not None and not p.derivative and not p.anchor]
    if estimator.num_directions == 1 and len(losses) == 1 and not isinstance(estimator, PerExample):
        raise UserError(
            f"weighting={weighting.name()} {does}, and estimator={estimator.name()} with num_directions=1 asks for "
            "one: raise estimator.num_directions, or use estimator=central"
        )


def refuse_other_rows(weighting: Any, method: Any) -> None:
    """Refuse directions of each example's own, whose losses are of different rows."""
    if isinstance(method.estimator, PerExample):
        raise UserError(
            f"weighting={weighting.name()} compares losses of the same rows, and estimator={method.estimator.name()} "
            "has those of different ones: use weighting=loss_std"
        )


def rms(values: Tensor) -> Tensor:
    """Root mean square."""
    return values.square().mean().sqrt()


def spread(measured: Measured) -> Tensor:
    """How far the losses move by the perturbation, a scalar; in units of a slope where it is exact.

    One side: the population's standard deviation over the directions. Two sides: each pair is set against its own mean,
    which takes away what both have in common (curvature, and with ``per_example`` the example's own loss); the root
    mean square of +-(L+ - L-) / 2 is left. An exact slope is the limit of such a pair: its root mean square.
    """
    losses = measured.losses
    if not losses.shape[1]:
        # exact slopes: no losses were asked for
        return rms(measured.projected_grads)
    # one side [Q, 1]: around the mean over directions; two sides [Q, 2]: around each pair's own mean
    return rms(losses - losses.mean(dim=0 if losses.shape[1] == 1 else 1, keepdim=True))
