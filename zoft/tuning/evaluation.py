"""One evaluation of a search: the point, and the outcome of each of its jobs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from zoft.tuning.space import Values, written

DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class Job:
    """What a worker is asked.

    Args:
        number: of the point, from 0.
        repeat: of the point, from 0.
        values: the point.
        trial_id: the storage's number of its trial.
    """

    number: int
    repeat: int
    values: Values
    trial_id: int = -1


@dataclass
class JobOutcome:
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
    def of(cls, row: dict[str, Any]) -> JobOutcome:
        """From the record."""
        return cls(**{name: row.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
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
    outcomes: list[JobOutcome] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``failed`` or ``stopped`` if any repeat is, else ``done``."""
        statuses = {outcome.status for outcome in self.outcomes}
        return next(status for status in (FAILED, STOPPED, DONE) if status in statuses)

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


# ---- What a search has found: every evaluation, the best of them, and both as a table and as plain data --------------


@dataclass
class TuneResult:
    """Every evaluation of a search.

    Args:
        space: name -> how the parameter is written.
        direction: minimize or maximize.
        repeats: evaluations of each point.
        evaluations: in the order of the search.
        num_resumed: how many of them came from the record.
        message: how it ended; empty while it goes on.
    """

    space: dict[str, str]
    direction: str = "minimize"
    repeats: int = 1
    evaluations: list[Evaluation] = field(default_factory=list)
    num_resumed: int = 0
    message: str = ""

    @property
    def ranked(self) -> list[Evaluation]:
        """Evaluations that ran to their end, the best first."""
        done = [e for e in self.evaluations if e.status == DONE]
        return sorted(done, key=lambda e: e.value if self.direction == "minimize" else -e.value)

    @property
    def failed(self) -> list[Evaluation]:
        """Evaluations that failed."""
        return [e for e in self.evaluations if e.status == FAILED]

    @property
    def stopped(self) -> list[Evaluation]:
        """Evaluations that were stopped half-way."""
        return [e for e in self.evaluations if e.status == STOPPED]

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation; None where none ran to its end."""
        return next(iter(self.ranked), None)

    @property
    def x(self) -> Values | None:
        """The best point."""
        return self.best.values if self.best else None

    @property
    def fun(self) -> float | None:
        """Its value."""
        return self.best.value if self.best else None

    @property
    def num_evaluations(self) -> int:
        """Calls of f, or jobs."""
        return sum(len(e.outcomes) for e in self.evaluations)

    def table(self, count: int = 10, metric: str = "value") -> str:
        """The best points, one a line."""
        names = list(self.space)
        rows = [["point", metric, *names]]
        rows += [
            [str(e.number), value_text(e), *(written(e.values[name]) for name in names)] for e in self.ranked[:count]
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def as_dict(self) -> dict[str, Any]:
        """For results.json: no NaN, nothing but plain data."""
        return {
            "space": self.space,
            "direction": self.direction,
            "repeats": self.repeats,
            "message": self.message,
            "num_evaluations": self.num_evaluations,
            "num_failed": len(self.failed),
            "num_stopped": len(self.stopped),
            "best": _plain(self.best) if self.best else None,
            "evaluations": [_plain(evaluation) for evaluation in self.evaluations],
        }


def value_text(evaluation: Evaluation) -> str:
    """The value, with its standard error over the repeats.

    Example:
        >>> from zoft.tuning.evaluation import JobOutcome
        >>> value_text(Evaluation(0, {}, [JobOutcome("done", 0.5), JobOutcome("done", 0.7)]))
        '0.6 ± 0.1'
    """
    spread = evaluation.spread
    return f"{evaluation.value:.5g}" + (f" ± {spread:.2g}" if spread is not None else "")


def _plain(e: Evaluation) -> dict[str, Any]:
    return {
        "number": e.number,
        "status": e.status,
        "point": e.values,
        "value": None if e.status == FAILED else e.value,
        "standard_error": e.spread,
        "values": [outcome.value for outcome in e.outcomes],
        "seconds": e.seconds,
        **({"error": e.error} if e.error else {}),
    }
