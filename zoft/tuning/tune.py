"""`zoft.tune`: the best parameters of any Python function, by search over ranges, whole numbers and choices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.tuning.evaluation import DONE, FAILED, Job, Outcome, TuneResult
from zoft.tuning.journal import TuneJournal
from zoft.tuning.parameters import SearchSpace, Values
from zoft.tuning.search import Callback, Search, Settings, finite, journal_at
from zoft.tuning.workers import Workers


@dataclass
class Call:
    """A job that is one call of f.

    Args:
        f: point -> number.
    """

    f: Callable[[Values], Any]

    def __call__(self, job: Job) -> Outcome:
        """Call it; whatever it raises is a failure of the point."""
        began = time.monotonic()
        try:
            value, error = finite(self.f(dict(job.values))), None
        except Exception as failure:
            value, error = None, f"{type(failure).__name__}: {failure}"
        return Outcome(FAILED if error else DONE, value, error=error, seconds=time.monotonic() - began)


def tune(
    f: Callable[[Values], Any],
    space: Mapping[str, Any],
    *,
    budget: int,
    x0: Values | None = None,
    repeats: int = 1,
    workers: int = 1,
    search: str = "zo",
    direction: str = "minimize",
    output_dir: str | Path | None = None,
    callback: Callback | None = None,
    seed: int = 0,
) -> TuneResult:
    """Search for the parameters at which a function is best, by its values alone.

    Every parameter lies in the unit cube (docs/tune.md says how), which is searched by :class:`zoft.Minimizer` as a
    noisy function: two-point differences along random directions. Where most parameters are choices there is no slope
    to follow, and ``search="tpe"`` is the better tool.

    Args:
        f: point (a dict of values by name) -> one finite number. What raises is a failed point: it is counted, and
            stays in the result with its error.
        space: name -> ``"log(1e-5,1e-1)"``, ``"uniform(0,1)"``, ``"int(1,8)"``, ``"logint(1,64)"``,
            ``"choice(a,b,c)"``, or an object of :mod:`zoft.tuning.parameters`.
        budget: most calls of f.
        x0: where to begin: values of some parameters or all; the middle of the others.
        repeats: calls at each point, against noise; the mean counts.
        workers: processes that call f at the same time (f must then be importable); half as many directions are asked
            along in a step. What a search began with, it keeps when it goes on.
        search: ``zo``, ``random``, or ``tpe`` (Optuna's, which must be installed).
        direction: ``minimize`` or ``maximize``.
        output_dir: folder of the journal; a search that was killed goes on from there when it is called again. A larger
            budget goes on as well.
        callback: called with each new :class:`zoft.tuning.evaluation.Evaluation` and the result so far; it ends
            the search by returning True.
        seed: of the search.

    Returns:
        A :class:`zoft.tuning.evaluation.TuneResult`: x, fun, evaluations, table() and more. Known points are not
        evaluated again, so rounding to whole numbers costs nothing.

    Raises:
        UserError: a space or settings that make no sense, a journal of another search, or a function that fails
            everywhere.

    Example:
        >>> def f(point):
        ...     return (point["depth"] - 3) ** 2 + abs(point["rate"] - 0.03) + (point["kind"] == "a")
        >>> found = tune(f, {"depth": "int(1,8)", "rate": "log(1e-4,1)", "kind": "choice(a,b)"}, budget=60)
        >>> found.x["depth"], found.x["kind"], found.num_evaluations
        (3, 'b', 60)
    """
    where, settings = SearchSpace(space), Settings(budget, repeats, workers, search, direction, seed)
    if x0 is not None:
        where.check(x0)
    journal = TuneJournal(journal_at(output_dir), settings.header(where, x0))
    try:
        with Workers(Call(f), workers) as pool:
            return Search(where, settings, pool, journal, x0).run(callback)
    finally:
        journal.close()
