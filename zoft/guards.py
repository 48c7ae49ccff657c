"""What keeps a step from harm: a running range for losses and slopes, and smaller batches when memory ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from zoft.data.rows import groups_of, take
from zoft.errors import OutOfMemoryError

if TYPE_CHECKING:
    from zoft.arguments import ZOConfig

log = logging.getLogger(__name__)

GUARDS = ("none", "clip", "rollback")
"""What is done about a step far outside the running range: nothing; its slopes are shortened; the run goes back."""

FEWEST = 10
"""Steps before there is a range."""

T = TypeVar("T")


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


def outside(recent: Sequence[Sequence[float]], loss: float, slope: float, factor: float) -> tuple[str, float] | None:
    """(what is wrong with a step, how much of its slopes would be in range); None where nothing is.

    Slopes are judged against ``factor`` times the running median; losses against the median plus ``factor`` times the
    median distance from it.

    Args:
        recent: (loss, slope) of the steps before.
        loss: training loss of the step.
        slope: root mean square of its projected gradients.
        factor: how far is far, > 1.

    Example:
        >>> outside([(0.5, 1.0)] * 10, 0.5, 50.0, 10.0)
        ('|projected gradient| 50 is far above its running median 1', 0.2)
    """
    finite = [(x, s) for x, s in recent if math.isfinite(x) and math.isfinite(s)]
    if len(finite) < FEWEST or not (math.isfinite(loss) and math.isfinite(slope)):
        return None
    usual = median(s for _, s in finite)
    if slope > factor * usual > 0:
        return f"|projected gradient| {slope:.3g} is far above its running median {usual:.3g}", factor * usual / slope
    middle = median(x for x, _ in finite)
    spread = max(median(abs(x - middle) for x, _ in finite), 1e-3 * abs(middle), 1e-8)
    if loss > middle + factor * spread:
        return f"the loss {loss:.3g} is far above its running median {middle:.3g}", (factor * spread) / (loss - middle)
    return None


def check(args: ZOConfig) -> str | None:
    """What is wrong with the guard's settings; None where nothing is."""
    if args.guard not in GUARDS:
        return f"guard must be one of {', '.join(GUARDS)}, got {args.guard!r}"
    if args.guard_factor <= 1:
        return f"guard_factor must be larger than 1, got {args.guard_factor}"
    if args.guard_steps < FEWEST:
        return f"guard_steps must be at least {FEWEST}, got {args.guard_steps}"
    if args.guard_back < 1:
        return f"guard_back must be at least 1, got {args.guard_back}"
    if args.guard == "rollback" and not args.journal:
        return "guard=rollback goes back by the journal: leave journal=true"
    return None


class Halving:
    """Asks again with micro-batches of half the size when memory does not suffice; the smaller size stays.

    Example:
        >>> halving = Halving()
        >>> halving(lambda window: len(window), [{"input_ids": [[1], [2]]}])
        1
    """

    def __init__(self) -> None:
        self.parts = 1

    def __call__(self, ask: Callable[[list[dict[str, Any]]], T], window: list[dict[str, Any]]) -> T:
        """The answer, from the largest micro-batches that fit.

        Args:
            ask: what needs the memory; leaves everything as it was when it raises.
            window: the step's micro-batches.

        Raises:
            OutOfMemoryError: single examples do not fit either.
        """
        while True:
            try:
                return ask(_cut(window, self.parts))
            except OutOfMemoryError:
                if self.parts >= max(len(groups_of(inputs)) for inputs in window):
                    raise
                self.parts *= 2
                log.warning("out of memory: the step is asked again in micro-batches of 1/%d the size", self.parts)


def _cut(window: list[dict[str, Any]], parts: int) -> list[dict[str, Any]]:
    """Every micro-batch in so many, or as many as it has examples."""
    if parts == 1:
        return window
    pieces = []
    for inputs in window:
        groups = groups_of(inputs)
        size = -(-len(groups) // parts)
        for start in range(0, len(groups), size):
            pieces.append(take(inputs, [row for group in groups[start : start + size] for row in group]))
    return pieces
