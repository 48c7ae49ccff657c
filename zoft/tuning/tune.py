"""`zoft.tune`: the best parameters of any Python function, by search over ranges, whole numbers and choices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.tuning.evaluation import DONE, FAILED, Job, JobOutcome, TuneResult
from zoft.tuning.settings import TuneSettings, record_at
from zoft.tuning.space import SearchSpace, Values
from zoft.tuning.workers import Workers

if TYPE_CHECKING:
    from zoft.tuning.search import Callback


@dataclass
class Call:
    """A job that is one call of f.

    Args:
        f: point -> number.
    """

    f: Callable[[Values], Any]

    def __call__(self, job: Job) -> JobOutcome:
        """Call it; whatever it raises is a failure of the point."""
        began = time.monotonic()
        try:
            value, error = _finite(self.f(dict(job.values))), None
        except Exception as failure:
            value, error = None, f"{type(failure).__name__}: {failure}"
        return JobOutcome(FAILED if error else DONE, value, error=error, seconds=time.monotonic() - began)


def _finite(value: Any) -> float:
    """A finite float, or a ValueError that says what it is instead."""
    from zoft.blackbox.calls import number

    result = number(value)
    if isinstance(result, BaseException):
        raise ValueError(f"f returned {result}")
    assert math.isfinite(result)
    return result


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

    A study of Optuna (``pip install 'zoft[tune]'``) keeps the trials, and the search is one of its samplers. By default
    that is :class:`zoft.tuning.sampler.ZOSampler`: every parameter lies in the unit cube (docs/tune.md says how), which
    is searched by two-point differences along random directions. Where most parameters are choices there is no slope
    to follow, and ``search="tpe"`` is the better tool.

    Args:
        f: point (a dict of values by name) -> one finite number. What raises is a failed point: it is counted, and
            stays in the result with its error.
        space: name -> ``"log(1e-5,1e-1)"``, ``"uniform(0,1)"``, ``"int(1,8)"``, ``"logint(1,64)"``,
            ``"choice(a,b,c)"``, or one of Optuna's distributions.
        budget: most calls of f.
        x0: where to begin: values of some parameters or all; the middle of the others.
        repeats: calls at each point, against noise; the mean counts.
        workers: processes that call f at the same time (f must then be importable); half as many directions are asked
            along in a step. What a search began with, it keeps when it goes on.
        search: ``zo`` (ours), ``random`` or ``tpe`` (Optuna's).
        direction: ``minimize`` or ``maximize``.
        output_dir: folder of the record (``journal.jsonl``, kept by Optuna's JournalStorage); a search that was killed
            goes on from there when it is called again. A larger budget goes on as well.
        callback: called with each new :class:`zoft.tuning.evaluation.Evaluation` and the result so far; it ends
            the search by returning True.
        seed: of the search.

    Returns:
        A :class:`zoft.tuning.evaluation.TuneResult`: x, fun, evaluations, table() and more. Known points are not
        evaluated again, so rounding to whole numbers costs nothing.

    Raises:
        UserError: a space or settings that make no sense, the record of another search, or a function that fails
            everywhere.

    Example:
        >>> def f(point):
        ...     return (point["depth"] - 3) ** 2 + abs(point["rate"] - 0.03) + (point["kind"] == "a")
        >>> found = tune(f, {"depth": "int(1,8)", "rate": "log(1e-4,1)", "kind": "choice(a,b)"}, budget=60)
        >>> found.x["depth"], found.x["kind"], found.num_evaluations
        (3, 'b', 60)
    """
    where, settings = SearchSpace(space), TuneSettings(budget, repeats, workers, search, direction, seed)
    if x0 is not None:
        where.check(x0)
    from zoft.tuning.record import StudyRecord
    from zoft.tuning.search import Search

    header = settings.header(where, x0)
    with Workers(Call(f), workers) as pool, closing(StudyRecord(record_at(output_dir), header, where)) as record:
        return Search(where, settings, pool, record, x0).run(callback)
