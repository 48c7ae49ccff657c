"""What a search has found: every evaluation, the best of them, and both as a table and as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from zoft.blackbox.tune.evaluation import DONE, FAILED, STOPPED, Evaluation
from zoft.blackbox.tune.parameters import written
from zoft.blackbox.tune.space import Values


@dataclass
class TuneResult:
    """Every evaluation of a search.

    Args:
        space: name -> how the parameter is written.
        direction: minimize or maximize.
        repeats: evaluations of each point.
        evaluations: in the order of the search.
        num_resumed: how many of them came from the journal.
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
        """Those that went to their end, the best first."""
        done = [e for e in self.evaluations if e.status == DONE]
        return sorted(done, key=lambda e: e.value if self.direction == "minimize" else -e.value)

    @property
    def failed(self) -> list[Evaluation]:
        """Those that failed."""
        return [e for e in self.evaluations if e.status == FAILED]

    @property
    def stopped(self) -> list[Evaluation]:
        """Those that were stopped half-way."""
        return [e for e in self.evaluations if e.status == STOPPED]

    @property
    def best(self) -> Evaluation | None:
        """The best one; None where none went to its end."""
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
        """The best points, one a line.

        Args:
            count: how many.
            metric: what a value is called.
        """
        names = list(self.space)
        rows = [["point", metric, *names]]
        rows += [
            [str(e.number), told_value(e), *(written(e.values[name]) for name in names)] for e in self.ranked[:count]
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


def told_value(evaluation: Evaluation) -> str:
    """The value, with its standard error over the repeats.

    Example:
        >>> from zoft.blackbox.tune.evaluation import Outcome
        >>> told_value(Evaluation(0, {}, [Outcome("done", 0.5), Outcome("done", 0.7)]))
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
