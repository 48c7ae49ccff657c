"""The course of a search: x0, whether f is noisy, and a pace: a given learning rate, or an automatic one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zoft.blackbox.automatic import automatic
from zoft.blackbox.ending import finish, kept_for_the_end, one_more_failed
from zoft.blackbox.settings import Settings
from zoft.blackbox.space import Space
from zoft.blackbox.walk import Walk

if TYPE_CHECKING:
    from zoft.blackbox.minimizer import Minimizer

_NOISE_CHECK_FROM = 10  # queries left, of which one may find out whether f is noisy


def search(settings: Settings, space: Space, host: Minimizer) -> None:
    """Run it; ends with a :class:`zoft.blackbox.ending.Stop`.

    Args:
        settings: checked.
        space: what x is.
        host: answers points with values, and counts.
    """
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


def fixed(settings: Settings, learning_rate: float, walk: Walk, host: Minimizer) -> None:
    """x <- x - learning_rate * estimate, to the end of the budget."""
    rule, failed = walk.method.optimizer, 0
    while True:
        done = 1 - host.left / settings.budget
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]
        estimator = walk.fitting(walk.method.estimator.at(done, share), host.left - kept_for_the_end(host))
        if estimator is None:
            finish(walk, host)
        rate = learning_rate * share * (estimator.num_directions if rule.scale_with_directions else 1)
        asked = walk.ask(estimator, rate)
        if asked.usable:
            length, failed = float(walk.write(rate).norm()), 0
            host.note_step(walk.session.at(), asked.loss, rate, estimator.radius, length)
        else:
            failed = one_more_failed(failed)
            host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)
