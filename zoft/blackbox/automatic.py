"""Which composition and which pace a search takes where the user leaves them open."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zoft.blackbox.descent import Descent
from zoft.blackbox.drift import Drift
from zoft.blackbox.ending import finish
from zoft.blackbox.settings import Settings
from zoft.blackbox.walk import Walk
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.method import Method

if TYPE_CHECKING:
    from zoft.blackbox.minimizer import Minimizer

_SWEEPS = 2  # a budget of so many sweeps over the coordinates is spent on sweeps
_FEW = 64  # random directions of a step where it is not, or fewer, so that there are some steps
_STEPS = 30
_ORTHOGONAL_TO = 50  # times as many dimensions as directions: beyond it random ones are nearly at right angles


def automatic(settings: Settings, walk: Walk, host: Minimizer) -> None:
    """Run with step sizes of its own; ends with a stop.

    Args:
        settings: with the parts that are given.
        walk: at x0, with the composition of these.
        host: answers points, and counts.
    """
    radius, noisy = settings.radius or first_radius(walk), host.result().noisy
    if settings.chooses_parts:
        (Drift if noisy else Descent)(walk, host, radius, fixes_eps=settings.fixes_eps).run()
        finish(walk, host, "converged", "No step of any length leads lower.")
    d = walk.space.num_elements
    if not noisy:
        sweeps = host.left >= _SWEEPS * (d + 1)
        method = Method.of("coordinate", OneSided(num_directions=d)) if sweeps else few_directions(d, host.left)
        walk = another(walk, host, method)
        pace = Descent(walk, host, radius, fixes_eps=settings.fixes_eps)
        if pace.run():
            finish(walk, host, "converged", "The next step is below the resolution of x or of f.")
        radius = pace.longest  # f has kinks or is flat here: look further
    walk = another(walk, host, smoothed(d))
    Drift(walk, host, radius, fixes_eps=settings.fixes_eps).run()
    finish(walk, host, "converged", "The steps are below the resolution of x.")


def few_directions(d: int, queries: int) -> Method:
    """For budgets below that: forward differences along a few random directions."""
    return Method.of("full", OneSided(num_directions=max(1, min(d, _FEW, queries // _STEPS))))


def smoothed(d: int) -> Method:
    """For noise and kinks: central differences along random directions, as far away as steps are long and further."""
    count = max(2, min(d, 8 + int(6 * math.log(d))))
    across = "orthogonal" if 1 < d <= _ORTHOGONAL_TO * count else "iid"
    return Method.of("full", Central(num_directions=count, across=across))


def another(walk: Walk, host: Minimizer, method: Method) -> Walk:
    """Another composition, from where a walk stands; no direction is used twice."""
    other = Walk(walk.space, method, host.values, walk.seed, walk.step)
    other.put(walk.vector(), walk.session.clean)
    return other


def first_radius(walk: Walk) -> float:
    """A tenth of the length of x0, or of sqrt(d) if that is longer, in units of scale."""
    return 0.1 * max(float(walk.vector().norm()), walk.space.num_elements**0.5)
