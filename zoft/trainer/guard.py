"""A running range of losses and slopes: it finds steps that are outliers, and says how to treat them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from zoft.step.estimate import StepEstimate

GUARDS = ("none", "clip", "rollback")
"""What is done about a step far outside the running range: nothing; its slopes are shortened; the run goes back."""

FEWEST = 10
"""Steps before there is a range."""


class RolledBack(Exception):
    """The run is to go on from an earlier step, at a lower learning rate.

    Args:
        step: number of steps to keep.
        reason: for the log.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step
        self.reason = reason


def guard(estimate: StepEstimate, recent: Sequence[Sequence[float]], factor: float) -> StepEstimate:
    """The estimate; an outlier is marked, and shortened to the length of one at the edge of the running range.

    Args:
        estimate: of a step, as it was queried.
        recent: (loss, slope) of the steps before.
        factor: how far is far, > 1.
    """
    # a skipped step has nothing to shorten; nodes have no slopes to judge by
    if not estimate.is_usable or estimate.projected_grads is None:
        return estimate
    why = outlier(recent, estimate.loss, estimate.slope, factor)
    if why is None:
        return estimate
    reason, share = why
    return replace(estimate.scaled(share), outlier=reason, share=share)


def outlier(recent: Sequence[Sequence[float]], loss: float, slope: float, factor: float) -> tuple[str, float] | None:
    """(what is wrong with a step, how much of its slopes would be in range); None where nothing is.

    Slopes are judged against ``factor`` times the running median; losses against the median plus ``factor`` times the
    median distance from it.

    Args:
        recent: (loss, slope) of the steps before.
        loss: training loss of the step.
        slope: root mean square of its projected gradients.
        factor: how far is far, > 1.

    Example:
        >>> outlier([(0.5, 1.0)] * 10, 0.5, 50.0, 10.0)
        ('|projected gradient| 50 is far above its running median 1', 0.2)
    """
    # NaN is no part of a range, and nothing is compared with it
    finite = [(x, s) for x, s in recent if math.isfinite(x) and math.isfinite(s)]
    # too few steps make no median that an outlier would stand out from
    if len(finite) < FEWEST or not (math.isfinite(loss) and math.isfinite(slope)):
        return None
    # medians, not means: an outlier among the recent steps hardly moves them
    usual = median(s for _, s in finite)
    if slope > factor * usual > 0:
        return f"|projected gradient| {slope:.3g} is far above its running median {usual:.3g}", factor * usual / slope
    middle = median(x for x, _ in finite)
    # median absolute deviation; bounded below, as a flat stretch would make every step an outlier
    spread = max(median(abs(x - middle) for x, _ in finite), 1e-3 * abs(middle), 1e-8)
    if loss > middle + factor * spread:
        # slopes shortened as much as the loss is beyond the range
        return f"the loss {loss:.3g} is far above its running median {middle:.3g}", (factor * spread) / (loss - middle)
    return None
