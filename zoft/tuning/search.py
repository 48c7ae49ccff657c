"""The search: asks a proposer for points, has them evaluated, keeps a journal, and says what is best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.tuning.evaluation import DONE, FAILED, STOPPED, Evaluation, Job, Outcome, TuneResult
from zoft.tuning.journal import TuneJournal
from zoft.tuning.parameters import SearchSpace, Values, as_arguments, key
from zoft.tuning.proposals import SEARCHES, proposer
from zoft.tuning.workers import Workers

DIRECTIONS = {"minimize": 1.0, "maximize": -1.0}
"""Which way, and the sign of what is minimised."""

_ENOUGH = 4  # others that must have reached their half before any is compared with their median
_MOST_KNOWN = 500  # blocks in a row that hold known points only

Callback = Callable[[Evaluation, TuneResult], Any]
"""Called with every new evaluation and all of them; returning True ends the search."""


@dataclass
class Settings:
    """How a search goes; see :func:`zoft.tune`."""

    budget: int
    repeats: int = 1
    workers: int = 1
    search: str = "zo"
    direction: str = "minimize"
    seed: int = 0
    stop_early: bool = False
    about: dict[str, Any] = field(default_factory=dict)  # what else a journal must agree in

    def __post_init__(self) -> None:
        for name in ("budget", "repeats", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.budget < self.repeats:
            raise UserError(
                f"budget={self.budget} evaluations pay for no point of repeats={self.repeats}: raise budget to "
                f"{self.repeats} or more"
            )
        for name, known in (("search", SEARCHES), ("direction", tuple(DIRECTIONS))):
            if getattr(self, name) not in known:
                near = did_you_mean(str(getattr(self, name)), known)
                raise UserError(f"there is no {name} called {getattr(self, name)!r}.{near}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed must be a whole number >= 0, got {self.seed!r}")

    def header(self, space: SearchSpace, x0: Values | None) -> dict[str, Any]:
        """What a journal must agree in; all but the budget, which may grow, and the workers."""
        names = ("repeats", "search", "direction", "seed", "stop_early")
        batch = 1 if self.search != "zo" and self.workers == 1 else self.workers
        return {
            "space": space.texts(),
            "start": x0,
            **{name: getattr(self, name) for name in names},
            "batch": batch,
            **self.about,
        }


class Search:
    """A search under way.

    It is a function of the space, the settings and the values that come back: to go on after a crash, it asks its way
    through the journal again and is answered from there.

    Args:
        space: what is searched.
        settings: how.
        workers: carry out the jobs.
        journal: keeps what came of them.
        x0: where to begin.
    """

    def __init__(
        self, space: SearchSpace, settings: Settings, workers: Workers, journal: TuneJournal, x0: Values | None = None
    ) -> None:
        self.space, self.settings, self.workers, self.journal = space, settings, workers, journal
        self.sign = DIRECTIONS[settings.direction]
        self.proposer = proposer(settings.search, space, settings.seed, journal.header["batch"], x0)
        self.by_key: dict[str, Evaluation] = {}
        self.result = TuneResult(space.texts(), settings.direction, settings.repeats)

    def run(self, callback: Callback | None = None) -> TuneResult:
        """To the end of the budget, or of the space.

        Args:
            callback: see :data:`Callback`.

        Returns:
            Everything that was evaluated.

        Raises:
            UserError: none of the first points could be evaluated.
        """
        known_only = 0
        while True:
            points = self.proposer.ask()
            new = {key(values): values for values in points if key(values) not in self.by_key}
            room = self.settings.budget // self.settings.repeats - len(self.by_key)
            fits = dict(list(new.items())[:room])
            ended = self._evaluate(list(fits.values()), callback)
            known_only = 0 if new else known_only + 1
            self.result.message = self._message(room - len(fits), ended, known_only)
            if self.result.message:
                return self.result
            self.proposer.tell([self._value_of(self.by_key[key(values)]) for values in points])

    def _message(self, room: int, ended: bool, known_only: int) -> str:
        evaluations = f"{sum(len(e.outcomes) for e in self.result.evaluations)} evaluations"
        if ended:
            return f"Ended by the callback after {evaluations}."
        if len(self.by_key) >= self.space.count or known_only > _MOST_KNOWN:
            return f"Every point that the search asks for is known, after {evaluations}."
        if room < 1:
            return f"The budget of {self.settings.budget} evaluations is spent."
        if len(self.by_key) >= min(_ENOUGH, room) and all(e.status == FAILED for e in self.by_key.values()):
            first = self.result.evaluations[0]
            raise UserError(
                f"the first {len(self.by_key)} points all failed, the first at {as_arguments(first.values)}: "
                f"{first.error}"
            )
        return ""

    def _value_of(self, evaluation: Evaluation) -> float:
        """What the proposer hears: a failed point is as bad as the worst one."""
        known = [self.sign * e.value for e in self.by_key.values() if e.status != FAILED]
        return max(known, default=0.0) if evaluation.status == FAILED else self.sign * evaluation.value

    def _evaluate(self, points: list[Values], callback: Callback | None) -> bool:
        """Have points evaluated, or find them in the journal; True if the callback ends the search."""
        first, limit = len(self.by_key), self._limit()
        evaluations = [Evaluation(first + i, values) for i, values in enumerate(points)]
        jobs, found = [], dict[tuple[int, int], Outcome]()
        for evaluation in evaluations:
            for repeat in range(self.settings.repeats):
                place = (evaluation.number, repeat)
                outcome = self.journal.known.get(place)
                if outcome is None:
                    jobs.append(Job(*place, evaluation.values, limit))
                elif key(self.journal.points[evaluation.number]) == key(evaluation.values):
                    found[place] = outcome
                else:
                    there = as_arguments(self.journal.points[evaluation.number])
                    raise UserError(
                        f"{self.journal.path}: point {evaluation.number} is {there}, and this version asks for "
                        f"{as_arguments(evaluation.values)}: begin anew in another folder"
                    )
        waiting = list(evaluations)
        ended = self._take(waiting, found, callback, fresh=False)
        for index, outcome in self.workers.run(jobs):
            job = jobs[index]
            self.journal.note(job.number, job.repeat, job.values, outcome)
            found[job.number, job.repeat] = outcome
            ended = self._take(waiting, found, callback, fresh=True) or ended
        self.result.evaluations.sort(key=lambda e: e.number)
        self.by_key |= {key(e.values): e for e in evaluations}
        return ended

    def _take(
        self, waiting: list[Evaluation], found: dict[tuple[int, int], Outcome], callback: Callback | None, fresh: bool
    ) -> bool:
        """Move the points of which every repeat is known from ``waiting`` to the result."""
        ended = False
        for evaluation in list(waiting):
            places = [(evaluation.number, repeat) for repeat in range(self.settings.repeats)]
            if all(place in found for place in places):
                evaluation.outcomes = [found[place] for place in places]
                waiting.remove(evaluation)
                self.result.evaluations.append(evaluation)
                self.result.num_resumed += not fresh
                if fresh and callback is not None:
                    ended = bool(callback(evaluation, self.result)) or ended
        return ended

    def _limit(self) -> float | None:
        """The median at half of the jobs of all earlier points, if that is to be compared with."""
        if not self.settings.stop_early:
            return None
        outcomes = [o for e in self.by_key.values() for o in e.outcomes if o.status in (DONE, STOPPED)]
        halves = [outcome.half for outcome in outcomes if outcome.half is not None]
        return statistics.median(halves) if len(halves) >= _ENOUGH else None


def finite(value: Any) -> float:
    """A finite float, or a ValueError that says what it is instead."""
    from zoft.blackbox.calls import number

    found = number(value)
    if isinstance(found, BaseException):
        raise ValueError(f"f returned {found}")
    assert math.isfinite(found)
    return found


def journal_at(folder: str | Path | None) -> Path | None:
    """The journal's place in a folder."""
    from zoft.tuning.journal import NAME

    return None if folder is None else Path(folder) / NAME
