"""How long a run will take, by a timed query, and what is said of one that takes hours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from zoft.report.text import duration

LONG_SECONDS = 3600.0
"""A run that takes longer says so before it begins."""


def seconds_per_query(query: Callable[[], Any], timed: int = 2, longest: float = 60.0) -> float:
    """The seconds of one query: the quickest of a few, after one that warms up.

    Args:
        query: makes one.
        timed: how many are timed.
        longest: seconds; a first query that takes longer is the measurement itself.

    Example:
        >>> seconds_per_query(lambda: None) < 1
        True
    """
    first = _seconds_of(query)
    return first if first > longest else min(_seconds_of(query) for _ in range(timed))


def long_run_line(seconds: float, queries: int) -> str | None:
    """What is said before a run of many hours; None where it is not long.

    Example:
        >>> print(long_run_line(9.8, 40_000))
        time    about 108:53:20 for 40,000 queries of 9.8 s (by timed queries); budget.queries=367 takes an hour.
                Ctrl-C stops the run, the same command goes on
        >>> long_run_line(0.01, 40_000)
    """
    total = seconds * queries
    if total <= LONG_SECONDS:
        return None
    return (
        f"time    about {duration(total)} for {queries:,} queries of {seconds:.3g} s (by timed queries); "
        f"budget.queries={max(1, int(LONG_SECONDS / seconds))} takes an hour.\n"
        "        Ctrl-C stops the run, the same command goes on"
    )


def _seconds_of(query: Callable[[], Any]) -> float:
    began = time.perf_counter()
    query()
    return time.perf_counter() - began
