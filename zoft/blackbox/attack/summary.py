"""What the outcomes say together: success rate against queries, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zoft.blackbox.attack.attack import Outcome
from zoft.evaluation.intervals import wilson


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, the rate of success and the queries that it took.

    Args:
        outcomes: of the images; those that were skipped are counted and left out of everything else.

    Returns:
        num_images, num_skipped, num_flipped, success_rate with its 95 % interval (Wilson), median_queries_flipped (of
        those that flipped; None without one), median_queries (of all, those that did not flip as never; None where
        fewer than half did) with its 95 % interval (order statistics; None for an end that is beyond the budget), and
        num_queries of all together.
    """
    tried = [o for o in outcomes if not o.skipped]
    flipped = sorted(o.num_queries for o in tried if o.success)
    spent = [*map(float, flipped), *[math.inf] * (len(tried) - len(flipped))]
    return {
        "num_images": len(tried),
        "num_skipped": len(outcomes) - len(tried),
        "num_flipped": len(flipped),
        "success_rate": len(flipped) / len(tried) if tried else None,
        "success_interval": list(wilson(len(flipped), len(tried))),
        "median_queries_flipped": _middle([float(q) for q in flipped]),
        "median_queries": _middle(spent),
        "median_interval": [_finite(end) for end in median_interval(spent)],
        "num_queries": sum(o.num_queries for o in outcomes),
    }


def curve(outcomes: Sequence[Outcome]) -> list[tuple[int, float, float, float]]:
    """Success rate against queries: (queries, rate, low, high), a row for every number at which the rate rises.

    Args:
        outcomes: of the images; those that were skipped are left out.
    """
    tried = [o for o in outcomes if not o.skipped]
    rows, flipped = [], sorted(o.num_queries for o in tried if o.success)
    for queries in [1, *sorted(set(flipped))]:
        count = sum(q <= queries for q in flipped)
        rows.append((queries, count / max(1, len(tried)), *wilson(count, len(tried))))
    return rows


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median from its sorted values: the innermost pair of them that holds it so often.

    Args:
        values: sorted; infinity for those beyond what was looked at.

    Returns:
        (low, high); (-inf, inf) of fewer than six values, which no pair of them can say so much about.

    Example:
        >>> median_interval([float(k) for k in range(1, 51)])
        (18.0, 33.0)

    References: David & Nagaraja 2003, section 7.1.
    """
    n, below = len(values), 0.0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n  # P(the median lies below the value number k, from 0)
        if below > 0.025:
            return (values[k - 1], values[n - k]) if k else (-math.inf, math.inf)
    return (-math.inf, math.inf)


def _middle(values: Sequence[float]) -> float | None:
    n = len(values)
    return _finite((values[(n - 1) // 2] + values[n // 2]) / 2) if n else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
