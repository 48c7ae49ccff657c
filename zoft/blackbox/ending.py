"""Why and how a search ends."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from zoft.blackbox.host import Host
from zoft.blackbox.walk import Walk

_MOST_FAILED = 20  # steps in a row
_MOST_AT_THE_END = 16  # queries of a noisy f where the search ends


class Stop(Exception):
    """The search ends.

    Args:
        status: see :class:`zoft.blackbox.result.Result`.
        message: a sentence.
        success: whether it ended as it should.
    """

    def __init__(self, status: str, message: str, *, success: bool = True) -> None:
        super().__init__(message)
        self.status, self.message, self.success = status, message, success


def kept_for_the_end(host: Host) -> int:
    """Queries reserved for the point where the search ends: one, or several of a noisy f."""
    return min(_MOST_AT_THE_END, 1 + host.budget // 20) if host.result().noisy else 1


def finish(walk: Walk, host: Host, status: str = "budget", message: str = "") -> NoReturn:
    """Ask what f is where the search has ended, unless that is known, and stop."""
    if walk.session.clean is None and host.left:
        x = walk.session.at()
        if host.result().noisy:
            measure(x, host)
        else:
            host.values([x])
    left = f"; {host.left} of them are left, which pay for no further step" if host.left else ""
    raise Stop(status, message or f"The budget of {host.budget} queries is spent{left}.")


def measure(x: Any, host: Host) -> None:
    """Report a point with its value (a mean where f is noisy); if f fails there, the nearest point where it did not."""
    calls = min(host.left, kept_for_the_end(host))
    first = host.values([x])[0] if calls else math.nan
    if not math.isfinite(first):
        x, first = host.nearest(x)
    values = [first, *host.values([x] * (calls - 1))] if calls > 1 else [first]
    values = [value for value in values if math.isfinite(value)]
    host.note(x=x, fun=math.fsum(values) / len(values))


def one_more_failed(failed: int) -> int:
    """Counts steps in a row in which a query failed; too many end the search."""
    if failed + 1 >= _MOST_FAILED:
        raise Stop("failed", f"In {_MOST_FAILED} steps in a row a query failed.", success=False)
    return failed + 1
