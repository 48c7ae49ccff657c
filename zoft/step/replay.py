"""A step that is read from the journal begins: the subspace stands where the step's queries had it."""

from __future__ import annotations

from zoft.engines._trace import pass_over
from zoft.estimators.base import Estimator
from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer


def begin(optimizer: ZOOptimizer, estimate: StepEstimate, estimator: Estimator) -> None:
    """All that :meth:`zoft.step.query.StepQueries.estimate` does but to query; ``apply`` may follow.

    Args:
        optimizer: at the end of the step before.
        estimate: of the step, from its record.
        estimator: of the run.
    """
    direction = estimate.directions[0]
    optimizer.coordinates.begin(direction)
    if estimate.observations is not None:
        optimizer.coordinates.load_state_dict(estimate.observations)
    optimizer.begin(direction)
    if estimate.eps:  # what walking to the points and back leaves in the weights, where that is not exact
        pass_over(optimizer.session, estimator.with_radius(estimate.eps).points(list(estimate.directions)))
