"""How long a run will take, by a timed query, and what is said of one that takes hours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from zoft.report.text import duration

LONG_SECONDS = 3600.0
"""A run that takes longer says so before it begins."""

_LONG_QUERY = 60.0  # seconds


def seconds_per_query(query: Callable[[], Any]) -> float:
    """The seconds of one query: the quickest of a few, after one that warms up.

    Args:
        query: makes one.

    Example:
        >>> seconds_per_query(lambda: None) < 1
        True
    """
    first = _seconds_of(query)
    # a first one that takes long is the measurement itself
    return first if first > _LONG_QUERY else min(_seconds_of(query) for _ in range(2))


def long_run_line(seconds: float, queries: int) -> str | None:
    """What is said before a run of many hours; None where it is not long.

    Example:
        >>> print(long_run_line(9.8, 40_000))
        time    at least 108:53:20: 40,000 forward passes of 9.8 s, and the steps between them (zoft estimate --time
                times those too); budget.queries=367 takes an hour. Ctrl-C stops the run, the same command goes on
        >>> long_run_line(0.01, 40_000)
    """
    total = seconds * queries
    if total <= LONG_SECONDS:
        return None
    return (
        f"time    at least {duration(total)}: {queries:,} forward passes of {seconds:.3g} s, and the steps between "
        "them (zoft estimate --time\n        times those too); "
        f"budget.queries={max(1, int(LONG_SECONDS / seconds))} takes an hour. "
        "Ctrl-C stops the run, the same command goes on"
    )


def _seconds_of(query: Callable[[], Any]) -> float:
    began = time.perf_counter()
    query()
    return time.perf_counter() - began
