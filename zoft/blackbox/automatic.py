"""Which composition and which pace a search takes where the user leaves them open."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from zoft.blackbox.descent import Descent
from zoft.blackbox.drift import Drift
from zoft.blackbox.settings import Settings
from zoft.blackbox.walk import Walk
from zoft.method import Method

if TYPE_CHECKING:
    from zoft.blackbox.minimizer import Minimizer


def automatic(settings: Settings, walk: Walk, host: Minimizer, clean: float) -> None:
    """Run with step sizes of its own; ends with a stop."""
    from zoft.blackbox.search import finish
    space, noisy = walk.space, host.result().noisy
    radius = settings.radius or first_radius(walk)
    if settings.chooses_parts:
        (Drift if noisy else Descent)(walk, host, radius, settings.fixes_eps).run()
        finish(walk, host, noisy, status="converged", message="x")
        return
    d = space.num_elements
    if noisy:
        Drift(again(walk, host, DRIFT(d)), host, radius).run()
    if host.left >= 6 * (d + 1):
        here = again(walk, host, Method.of("coordinate", _one_sided(d)), clean)
    else:
        here = again(walk, host, Method.of("full", _one_sided(min(d, 16))), clean)
    from zoft.blackbox.search import finish
    Descent(here, host, radius).run()
    finish(here, host, noisy, status='converged', message='stuck')


def _one_sided(q):
    from zoft.estimators.one_sided import OneSided

    return OneSided(num_directions=q)


def DRIFT(d):
    from zoft.estimators.central import Central

    return Method.of("full", Central(num_directions=max(2, min(d, 4 + int(3 * math.log(d))))))


def again(walk: Walk, host: Minimizer, method: Method, clean: float | None = None) -> Walk:
    """Another composition from where a walk stands; directions are not used twice."""
    other = Walk(walk.space, method, host.values, walk.seed, walk.step)
    other.put(walk.vector(), clean)
    return other


def first_radius(walk: Walk) -> float:
    """A tenth of the length of x0 (of sqrt(d) if that is longer, of half the box where there is one)."""
    return 0.1 * max(float(walk.vector().norm()), walk.session.weights.num_elements**0.5)
