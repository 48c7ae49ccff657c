"""The pace for a function without noise: every step is tried before it is kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zoft.blackbox.bends import Bends
from zoft.blackbox.walk import Walk
from zoft.optimizers.sgd import SGD

if TYPE_CHECKING:
    from torch import Tensor

    from zoft.blackbox.minimizer import Minimizer

_TRIES = 10  # steps tried along one direction
_MEMORY = 10  # pairs for the curvature
_PATIENCE = 4  # directions in a row along which no step led lower


class Descent:
    def __init__(self, walk: Walk, host: Minimizer, radius: float, fixes_eps: bool = False) -> None:
        self.walk, self.host, self.fixes_eps = walk, host, fixes_eps
        self.length = radius  # of the last step
        self.rate: float | None = None  # multiple of the estimate that the last step was
        method, self.d = walk.method, walk.session.weights.num_elements
        self.is_plain = type(method.optimizer) is SGD and method.weighting.name() == "mean"
        self.is_full = self.is_plain and method.estimator.num_directions >= self.d and (
            method.subspace.name() == "coordinate" or method.estimator.across == "orthogonal"
        )
        self.bends = Bends(_MEMORY)
        self.gradient = 0.0
        self.past: tuple[Tensor, Tensor] | None = None  # x and gradient of the step before
        self.failed = self.stuck = 0

    def run(self) -> str:
        """Until nothing leads lower, or the budget is spent (a stop)."""
        from zoft.blackbox.search import count_failed, finish

        walk, host = self.walk, self.host
        f = walk.session.clean
        if f is None:
            f = walk.value()
        while True:
            walk.put(walk.vector(), f)
            estimator = walk.fitting(walk.with_eps(self.eps()), host.left - 1)
            if estimator is None:
                finish(walk, host, False)
                raise AssertionError
            asked = walk.ask(estimator)
            if not asked.usable:
                self.failed = count_failed(self.failed)
                self.length, self.past = self.length / 4, None
                host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)
                continue
            self.failed = 0
            here = walk.vector()
            step = walk.write(1.0, project=False)
            slope = float(asked.measured.projected_grads.square().mean()) if self.is_plain else None
            f, rate, moved = self.move(here, step, f, slope)
            walk.put(here + moved, f)
            length = float(moved.norm())
            host.note_step(walk.session.at(), f, rate, estimator.radius, length)
            if length:
                self.stuck, self.length = 0, length
                self.rate = rate or self.rate
            else:
                self.stuck += 1
                self.length /= 30
                self.rate = self.rate and self.rate / 30
                self.past = None
                self.bends.pairs.clear()
                if self.stuck >= _PATIENCE:
                    return "stuck"

    def eps(self) -> float:
        if self.fixes_eps:
            return self.walk.method.estimator.radius
        eps = 0.1 * self.length / self.d
        if self.bends.pairs and self.gradient:
            bend = max(float(y @ y) / float(s @ y) for s, y in self.bends.pairs)
            eps = min(eps, 0.1 * self.gradient / bend / self.d)
        floor = 1e-14 * float(self.walk.vector().abs().max())
        f = abs(self.walk.session.clean or 0.0)
        if self.rate:
            floor = max(floor, 2 * math.sqrt(2.2e-16 * f * self.rate))
        return max(eps, floor / self.walk.reach, 1e-200)

    def move(self, here, step, f, slope):
        """(value, multiple of the estimate, displacement)"""
        size = float(step.norm())
        zero, self.gradient = step * 0, size
        if not size:
            return f, 0.0, zero
        default = self.rate or self.length / size
        if self.is_full:
            gradient = -step
            if self.past is not None:
                self.bends.add(here - self.past[0], gradient - self.past[1])
            self.past = here, gradient
            free = self.walk.free(gradient)
            newton = self.bends.direction(gradient, free)
            if newton is not None:
                slope2 = -float(newton @ gradient)
                if slope2 > 0:
                    value, a, moved = self.along(here, newton, f, 1.0, slope2)
                    if a:
                        return value, float(moved.norm()) / size, moved
            step = step * free
        return self.along(here, step, f, default, slope)

    def along(self, here, step, f, a, slope):
        walk, host = self.walk, self.host
        best = (f, 0.0, step * 0)
        tried = {}
        for _ in range(_TRIES):
            if not host.left:
                break
            walk.put(here + a * step)
            moved = walk.vector() - here
            if not float(moved.norm()):
                break
            value = walk.value()
            if value < f - 1e-4 * a * (slope or 0.0):
                best = (value, a, moved)
                break
            shrink = 0.25
            if slope and math.isfinite(value):
                shrink = min(0.5, max(0.1, 0.5 * a * slope / max(value - f + a * slope, 1e-300)))
            a *= shrink
        value, a, moved = best
        if a and slope and host.left and not self.is_full:
            curve = (value - f + a * slope) / a**2  # a parabola through what is known
            b = min(slope / (2 * curve), 4 * a) if curve > 0 else 4 * a
            if not 0.5 < b / a < 2:
                walk.put(here + b * step)
                other = walk.value()
                if other < value:
                    best = (other, b, walk.vector() - here)
        return best
