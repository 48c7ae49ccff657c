"""A step that is read from the journal begins: the subspace stands where the step's queries had it."""

from __future__ import annotations

from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer


def begin(optimizer: ZOOptimizer, estimate: StepEstimate) -> None:
    """What :meth:`zoft.step.query.StepQueries.estimate` settles before it queries; ``apply`` may follow.

    Args:
        optimizer: at the end of the step before.
        estimate: of the step, from its record.
    """
    direction = estimate.directions[0]
    optimizer.coordinates.begin(direction)
    if estimate.observations is not None:
        optimizer.coordinates.load_state_dict(estimate.observations)
    optimizer.begin(direction)
