"""The course of a search: x0, the choice of a composition and of its pace, and why it ends."""

from __future__ import annotations

import math

from typing import TYPE_CHECKING

from zoft.blackbox.settings import Settings
from zoft.blackbox.space import Space
from zoft.blackbox.walk import Walk

if TYPE_CHECKING:
    from zoft.blackbox.minimizer import Minimizer

_MOST_FAILED = 20  # steps in a row
_NOISE_CHECK_FROM = 10  # queries left, of which one may find out whether f is noisy


class Stop(Exception):  # noqa: N818 - it is no error
    """The search ends.

    Args:
        status: see :class:`zoft.blackbox.result.Result`.
        message: a sentence.
        success: whether it ended as it should.
    """

    def __init__(self, status: str, message: str, *, success: bool = True) -> None:
        super().__init__(message)
        self.status, self.message, self.success = status, message, success


def search(settings: Settings, space: Space, host: Minimizer) -> None:
    """Run it; ends with a :class:`Stop`.

    Args:
        settings: checked.
        space: what x is.
        host: answers points with values, and counts.
    """
    walk = Walk(space, settings.method(space), host.values, settings.seed)
    clean, noisy = look(settings, walk, host)
    host.note(noisy=noisy)
    if settings.rate is None:
        from zoft.blackbox.automatic import automatic  # it ends as all do, in finish()

        automatic(settings, walk, host, clean)
    else:
        fixed(settings, walk, host, clean)


def look(settings: Settings, walk: Walk, host: Minimizer) -> tuple[float, bool]:
    """(f at x0, whether f is noisy): asked twice where that is to be found out and affordable."""
    clean, noisy = walk.value(), settings.noisy
    if noisy is None:
        noisy = host.left >= _NOISE_CHECK_FROM and walk.value() != clean
    if not noisy:
        walk.session.clean = clean
    return clean, noisy


def reserve(settings: Settings, noisy: bool) -> int:
    """Queries that are kept for the point where the search ends."""
    return min(16, 1 + settings.budget // 20) if noisy else 1


def finish(walk: Walk, host: Minimizer, noisy: bool, *, status: str = "budget", message: str = "") -> None:
    """Ask what f is where the search has ended, with what was kept for it, and stop."""
    x = walk.session.at()
    if walk.session.clean is None and host.left:
        values = [v for v in host.values([x] * (min(host.left, 16) if noisy else 1)) if math.isfinite(v)]
        if noisy and values:
            host.note(x=x, fun=math.fsum(values) / len(values))
    left = f", {host.left} of it unused, which pay for no further step" if host.left else ""
    raise Stop(status, message or f"The budget of {host.budget} queries is spent{left}.")


def fixed(settings: Settings, walk: Walk, host: Minimizer, clean: float) -> None:
    """Steps of a given learning rate, to the end of the budget."""
    rule, noisy, failed = walk.method.optimizer, host.result().noisy, 0
    kept = reserve(settings, noisy)
    while True:
        done = 1 - host.left / settings.budget
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
        estimator = walk.fitting(walk.method.estimator.at(done, share), host.left - kept)
        if estimator is None:
            finish(walk, host, noisy)
            return
        rate = settings.rate * share * (estimator.num_directions if rule.scale_with_directions else 1)
        asked = walk.ask(estimator, rate)
        length = 0.0
        if asked.usable:
            length, failed = float(walk.write(rate).norm()), 0
        else:
            failed = count_failed(failed)
        host.note_step(walk.session.at(), asked.loss, rate if asked.usable else 0.0, estimator.radius, length)


def count_failed(failed: int) -> int:
    """One more step in a row in which a query failed; too many end the search."""
    if failed + 1 >= _MOST_FAILED:
        raise Stop("failed", f"In {_MOST_FAILED} steps in a row a query failed.", success=False)
    return failed + 1
