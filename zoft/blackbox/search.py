"""The course of a search: x0, whether f is noisy, and a pace: a given learning rate, or an automatic one."""

from __future__ import annotations

import math

from zoft.blackbox.ending import finish, kept_for_the_end, one_more_failed
from zoft.blackbox.host import Host
from zoft.blackbox.line_search import LineSearch
from zoft.blackbox.settings import MinimizeSettings
from zoft.blackbox.space import Space
from zoft.blackbox.step_adaptation import StepSizeAdaptation
from zoft.blackbox.walk import Walk
from zoft.estimators.base import scheduled
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.step.method import Method

_NOISE_CHECK_FROM = 10  # queries left, of which one may find out whether f is noisy
_SHORTER, _LONGER = 0.5, 0.9  # times a given learning rate, after a step into a place where f fails; back, step by step


def search(settings: MinimizeSettings, space: Space, host: Host) -> None:
    """Run it; ends with a :class:`zoft.blackbox.ending.Stop`."""
    walk = Walk(space, settings.method(space), host.values, settings.seed)
    clean, noisy = walk.value(), settings.noisy
    if noisy is None:
        noisy = host.left >= _NOISE_CHECK_FROM and walk.value() != clean
    host.note(noisy=noisy)
    if not noisy:
        walk.session.clean = clean
    if settings.rate is None:
        automatic(settings, walk, host)
    else:
        fixed(settings, settings.rate, walk, host)


def fixed(settings: MinimizeSettings, learning_rate: float, walk: Walk, host: Host) -> None:
    """x <- x - learning_rate * estimate, to the end of the budget; back, and shorter, where f fails everywhere."""
    rule, failed, shortened = walk.method.optimizer, 0, 1.0
    good = walk.vector()  # where f does not fail at most points around
    while True:
        done = 1 - host.left / settings.budget
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
        estimator = walk.fitting(scheduled(walk.method.estimator, done, share), host.left - kept_for_the_end(host))
        if estimator is None:
            finish(walk, host)
        rate = learning_rate * share * (estimator.num_directions if rule.scale_with_directions else 1) * shortened
        estimate = walk.ask(estimator, rate)
        if estimate.is_usable:
            if 2 * walk.session.num_failed <= len(estimate.losses):
                good = walk.vector()
            length, failed, shortened = float(walk.write(estimate, rate).norm()), 0, min(1.0, shortened / _LONGER)
            loss = math.nan if walk.session.num_failed else estimate.loss
            host.note_step(walk.session.at(), loss, rate, estimator.radius, length)
        else:
            walk.put(good)
            failed, shortened = one_more_failed(failed), shortened * _SHORTER
            host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)


# ---- Which composition and which pace a search takes where the user leaves them open ---------------------------------

_SWEEPS = 2  # a budget that pays for this number of sweeps over the coordinates is spent on sweeps
_FEW = 64  # random directions of a step where it is not, or fewer, so that there are some steps
_STEPS = 30
_ORTHOGONAL_TO = 50  # times as many dimensions as directions: beyond it random ones are nearly at right angles


def automatic(settings: MinimizeSettings, walk: Walk, host: Host) -> None:
    """Run with step sizes of its own; ends with a stop.

    Args:
        settings: with the parts that are given.
        walk: at x0, with the composition of these.
        host: answers points, and counts.
    """
    radius, noisy = settings.radius or first_radius(walk), host.result().noisy
    if settings.chooses_parts:
        (StepSizeAdaptation if noisy else LineSearch)(walk, host, radius, fixes_eps=settings.fixes_eps).run()
        finish(walk, host, "converged", "No step of any length leads lower.")
    d = walk.space.num_elements
    if not noisy:
        sweeps = host.left >= _SWEEPS * (d + 1)
        method = Method.of("coordinate", OneSided(num_directions=d)) if sweeps else few_directions(d, host.left)
        walk = another(walk, host, method)
        pace = LineSearch(walk, host, radius, fixes_eps=settings.fixes_eps)
        if pace.run():
            finish(walk, host, "converged", "The next step is below the resolution of x or of f.")
        radius = pace.longest  # f has kinks or is flat here: look further
    walk = another(walk, host, smoothed(d))
    StepSizeAdaptation(walk, host, radius, fixes_eps=settings.fixes_eps).run()
    finish(walk, host, "converged", "The steps are below the resolution of x.")


def few_directions(d: int, queries: int) -> Method:
    """For budgets below that: forward differences along a few random directions."""
    return Method.of("full", OneSided(num_directions=max(1, min(d, _FEW, queries // _STEPS))))


def smoothed(d: int) -> Method:
    """For noise and kinks: central differences along random directions, as far away as steps are long and further."""
    count = max(2, min(d, 8 + int(6 * math.log(d))))
    across = "orthogonal" if 1 < d <= _ORTHOGONAL_TO * count else "iid"
    return Method.of("full", Central(num_directions=count, across=across))


def another(walk: Walk, host: Host, method: Method) -> Walk:
    """Another composition, from where a walk stands; no direction is used twice."""
    other = Walk(walk.space, method, host.values, walk.seed, walk.step)
    other.put(walk.vector(), walk.session.clean)
    return other


def first_radius(walk: Walk) -> float:
    """A tenth of the length of x0, or of sqrt(d) if that is longer, in units of scale."""
    return 0.1 * max(float(walk.vector().norm()), walk.space.num_elements**0.5)
