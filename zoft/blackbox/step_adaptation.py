"""The pace for noise and kinks: no single value judges a step; steps that agree in direction lengthen the next."""

from __future__ import annotations

import math

from zoft.blackbox.ending import finish, kept_for_the_end, one_more_failed
from zoft.blackbox.host import Host
from zoft.blackbox.walk import Walk
from zoft.utils.lazy import Tensor

_REACH = 4.0  # distance of the queries, in lengths of the step
_FAILED = 0.3  # times the radius, after a step at all of whose points f failed; at half of them its root
_SMALLEST = 1e-10  # length of a step, relative to x, that is believed to be one


class StepSizeAdaptation:
    """Steps of a length that grows while they go the same way, and shrinks while they go back and forth.

    The running sum p <- (1 - c) p + sqrt(c (2 - c)) u of the steps' directions u has length one on average where they
    have nothing to do with each other, as under pure noise; the radius is multiplied by exp(c (|p|^2 - 1)). Queries are
    made at ``_REACH`` times the length of the step, so that a difference is large against the noise and looks across
    kinks. No value of f decides anything, so a lucky one does no harm.

    Args:
        walk: a composition where the search stands.
        host: answers points, and counts.
        radius: length of the first step.
        fixes_eps: leave the radius of the differences as the estimator has it.

    References: Ostermeier, Gawelczyk & Hansen 1994 (cumulative step-size adaptation); Hansen & Ostermeier 2001.
    """

    def __init__(self, walk: Walk, host: Host, radius: float, *, fixes_eps: bool = False) -> None:
        self.walk, self.host, self.radius, self.fixes_eps = walk, host, radius, fixes_eps
        self.d = walk.space.num_elements
        self.memory = 1 / (1 + math.sqrt(self.d) / 2)  # c
        self.path: Tensor | None = None  # p
        self.most = walk.space.most_eps * math.sqrt(self.d) / _REACH

    def run(self) -> None:
        """To the end of the budget (a stop), or until steps are below the resolution of x."""
        walk, host, failed = self.walk, self.host, 0
        good = walk.vector()  # where f did not fail at every point around
        while self.radius > _SMALLEST * float(walk.vector().norm()) or host.result().noisy:
            estimator = walk.fitting(walk.method.estimator.with_radius(self.eps()), host.left - kept_for_the_end(host))
            if estimator is None:
                finish(walk, host)
            estimate = walk.ask(estimator)
            if not estimate.is_usable:
                failed = one_more_failed(failed)
                walk.put(good)
                self.radius, self.path = self.radius * _FAILED, None
                host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)
                continue
            failed, good = 0, walk.vector()
            before, share = good, walk.session.num_failed / len(estimate.losses)
            shorter = self.radius * _FAILED**share if share else math.inf
            step = walk.write(estimate, 1.0, project=False)
            step = step * walk.free(-step, before)
            size = float(step.norm())
            walk.put(before + step * (self.radius / size) if size else before)
            moved = walk.vector() - before
            length = float(moved.norm())
            self.learn(moved / self.radius)
            self.radius = min(self.radius, shorter)
            loss = math.nan if share else estimate.loss
            host.note_step(walk.session.at(), loss, length / size if size else 0.0, estimator.radius, length)

    def eps(self) -> float:
        """A direction is as long as sqrt(d)."""
        return self.walk.method.estimator.radius if self.fixes_eps else _REACH * self.radius / math.sqrt(self.d)

    def learn(self, step: Tensor) -> None:
        """Adapt the length to a step, given in units of it; a step that a bound has cut is shorter."""
        c = self.memory
        self.path = step if self.path is None else (1 - c) * self.path + math.sqrt(c * (2 - c)) * step
        self.radius = min(self.most, self.radius * math.exp(min(1.0, c * (float(self.path @ self.path) - 1))))
