"""One evaluation: what is to be evaluated, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from zoft.blackbox.tune.space import Values

DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class Job:
    """What a worker is asked.

    Args:
        number: of the point, from 0.
        repeat: of the point, from 0.
        values: the point.
        limit: the metric at half of the job beyond which it is to be stopped; None for never.
    """

    number: int
    repeat: int
    values: Values
    limit: float | None = None


@dataclass
class Outcome:
    """What came of a job.

    Args:
        status: ``done``, ``stopped`` (at half, as a bad one) or ``failed``.
        value: the metric at its end (at half, where stopped); None where it failed.
        half: the metric at half, where there is one.
        error: why it failed.
        seconds: it took.
    """

    status: str
    value: float | None = None
    half: float | None = None
    error: str | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, row: dict[str, Any]) -> Outcome:
        """From a row of the journal."""
        return cls(**{name: row.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        """For a row of the journal."""
        return asdict(self)


@dataclass
class Evaluation:
    """A point and all its repeats.

    Args:
        number: in the order of the search, from 0.
        values: the point.
        outcomes: one a repeat.
    """

    number: int
    values: Values
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``failed`` or ``stopped`` if any repeat is, else ``done``."""
        found = {outcome.status for outcome in self.outcomes}
        return next(status for status in (FAILED, STOPPED, DONE) if status in found)

    @property
    def value(self) -> float:
        """The mean over the repeats; NaN where one failed."""
        known = [outcome.value for outcome in self.outcomes if outcome.value is not None]
        return math.fsum(known) / len(known) if len(known) == len(self.outcomes) else math.nan

    @property
    def spread(self) -> float | None:
        """Standard error of the mean over the repeats; None for fewer than two."""
        known, mean = [outcome.value for outcome in self.outcomes if outcome.value is not None], self.value
        if len(known) < 2 or math.isnan(mean):
            return None
        return math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1) / len(known))

    @property
    def error(self) -> str | None:
        """Why it failed."""
        return next((outcome.error for outcome in self.outcomes if outcome.error), None)

    @property
    def seconds(self) -> float:
        """All its jobs took."""
        return math.fsum(outcome.seconds or 0.0 for outcome in self.outcomes)
