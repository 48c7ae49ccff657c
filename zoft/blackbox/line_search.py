"""The pace for a function without noise: every step is tried before it is taken; gradients go through L-BFGS."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from zoft.blackbox.ending import finish, one_more_failed
from zoft.blackbox.host import Host
from zoft.blackbox.walk import Walk
from zoft.optimizers.sgd import SGD
from zoft.utils.lazy import Tensor

_MEMORY = 10  # pairs for the curvature
_FLOAT32, _FLOAT64 = 2.0**-23, 2.0**-52  # rounding of f, relative
_SHORTER = 4  # times the radius shrinks before a point that fails is taken for a worse one
_ERROR = 0.1  # of a difference that may come from the curvature, about


@dataclass(frozen=True)
class _Patience:
    """How soon it gives up.

    Args:
        tries: lengths tried along one direction.
        directions: in a row, of which no length led lower.
        shrink: what the length is divided by after each of them.
    """

    tries: int
    directions: int
    shrink: float


_GRADIENT, _RANDOM = _Patience(10, 4, 30.0), _Patience(3, 30, 4.0)


class LineSearch:
    """Steps that lower f, found by trying: backtracking, and a longer one where a parabola says so.

    Where the estimate is the whole gradient (all coordinates in a step, plain SGD), differences of the last gradients
    bend its direction (L-BFGS). The radius of the differences is a tenth of what the step's length allows, so that
    the curvature makes up a small part of each, but no less than where the rounding of f takes over.

    Args:
        walk: a composition where the search stands.
        host: answers points, and counts.
        radius: length of the first step that is tried.
        fixes_eps: leave the radius of the differences as the estimator has it.

    References: Nocedal & Wright 2006, sections 3.5 (backtracking), 7.2 (L-BFGS), 8.1 (radius of a forward difference).
    """

    def __init__(self, walk: Walk, host: Host, radius: float, *, fixes_eps: bool = False) -> None:
        self.walk, self.host, self.fixes_eps = walk, host, fixes_eps
        self.length = radius  # of the last step
        self.rate: float | None = None  # the last step, as a multiple of the estimate
        self.lengths: deque[float] = deque([radius], maxlen=20)
        method, self.d = walk.method, walk.space.num_elements
        self.is_plain = type(method.optimizer) is SGD and not method.optimizer.weight_decay
        self.is_plain &= method.weighting.name() == "mean" and method.estimator.measures_slopes
        right_angles = method.subspace.name() == "coordinate" or method.estimator.across == "orthogonal"
        self.is_full = self.is_plain and right_angles and method.estimator.num_directions >= self.d
        self.patience = _GRADIENT if self.is_full else _RANDOM
        self.bends = LBFGSMemory(_MEMORY)
        self.past: tuple[Tensor, Tensor] | None = None  # u and gradient of the step before
        self.gradient = 0.0  # length of the last estimate
        self.f, self.rounding = math.nan, _FLOAT32  # until a value is seen that float32 does not have

    @property
    def longest(self) -> float:
        """The longest of the last steps."""
        return max(self.lengths)

    def run(self) -> bool:
        """To the end of the budget (a stop), or until no step leads lower: whether by the resolution of x or f."""
        walk, host, failed, stuck, self.too_small = self.walk, self.host, 0, 0, False
        self.f = walk.value() if walk.session.clean is None else walk.session.clean
        while stuck < self.patience.directions:
            walk.put(walk.vector(), self.f)
            if self.f != float(np.float32(self.f)):
                self.rounding = _FLOAT64
            estimator = walk.fitting(walk.method.estimator.with_radius(self.eps()), host.left - 1)
            if estimator is None:
                finish(walk, host)
            estimate = walk.ask(estimator, penalises=failed >= _SHORTER)
            if not estimate.is_usable:
                failed = one_more_failed(failed)
                self.length, self.past = self.length / 4, None
                host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)
                continue
            failed, here = 0, walk.vector()
            slopes = estimate.projected_grads if self.is_plain else None
            step = walk.write(estimate, 1.0, project=False)
            self.f, moved = self.move(here, step, None if slopes is None else float(slopes.square().mean()))
            walk.put(here + moved, self.f)
            length = float(moved.norm())
            rate = length / self.gradient if self.gradient else 0.0
            host.note_step(walk.session.at(), self.f, rate, estimator.radius, length)
            stuck = 0 if length else stuck + 1
            self.learn(length, rate)
        return self.too_small

    def learn(self, length: float, rate: float) -> None:
        """Adapt the length of the next step to the step that was taken, or to there being none."""
        if length:
            self.length, self.rate = length, rate
            self.lengths.append(length)
            return
        self.length /= self.patience.shrink
        self.rate = None if self.rate is None else self.rate / self.patience.shrink
        self.past = None
        self.bends.pairs.clear()

    # ---- how far away to ask -----------------------------------------------------------------------------------------

    def eps(self) -> float:
        """A forward difference over h has the curvature's h k / 2 in it, and the rounding's |f| 2^-52 / h."""
        if self.fixes_eps:
            return self.walk.method.estimator.radius
        most, bend = _ERROR * self.length / self.d, None if self.rate is None else 1 / self.rate
        if self.bends.pairs:
            bend = max(float(y @ y) / float(s @ y) for s, y in self.bends.pairs)
            most = min(most, _ERROR * self.gradient / bend / self.d)
        least = 0.0 if not bend else 2 * math.sqrt(self.rounding * abs(self.f) / bend)
        return max(most, least / self.walk.reach, self.walk.least_eps, 1e-200)

    # ---- where to go -------------------------------------------------------------------------------------------------

    def move(self, here: Tensor, step: Tensor, slope: float | None) -> tuple[float, Tensor]:
        """(f at the new point, the move to it); a zero move and f here where no trial is lower.

        Args:
            here: u.
            step: the optimizer's, of learning rate one.
            slope: how fast f falls along it, where that is known.
        """
        self.gradient = float(step.norm())
        if not self.gradient:
            return self.f, step
        rate = self.rate or self.length / self.gradient
        if self.is_full:
            gradient = -step
            if self.past is not None:
                self.bends.add(here - self.past[0], gradient - self.past[1])
            self.past, free = (here, gradient), self.walk.free(gradient, here)
            newton, step = self.bends.direction(gradient, free), step * free
            if newton is not None and float(newton @ step) > 0:
                trial = self.along(here, newton, 1.0, float(newton @ step))
                if trial[1].any():
                    return trial
        return self.along(here, step, rate, slope)

    def along(self, here: Tensor, step: Tensor, rate: float, slope: float | None) -> tuple[float, Tensor]:
        """As :meth:`move`, along one direction, beginning with a multiple of it."""
        size = float(step.norm())
        small = rate * size <= 1e-10 * float(here.norm())
        self.too_small = small or (slope is not None and rate * slope <= 1e-11 * abs(self.f))
        for _ in range(self.patience.tries):
            if not self.host.left:
                break
            value, moved = self.at(here + rate * step, here)
            if value < self.f - 1e-4 * rate * (slope or 0.0):
                return self.further(here, step, rate, slope, value, moved)
            shrink = 0.25
            if slope and math.isfinite(value):
                shrink = min(0.5, max(0.1, 0.5 * rate * slope / (value - self.f + rate * slope)))
            rate *= shrink
        return self.f, step * 0

    def further(
        self, here: Tensor, step: Tensor, rate: float, slope: float | None, value: float, moved: Tensor
    ) -> tuple[float, Tensor]:
        """A step that leads lower, or the minimum of a parabola through the known values where that is lower still."""
        if not slope or self.is_full or not self.host.left:
            return value, moved
        curve = (value - self.f + rate * slope) / rate**2
        best = min(slope / (2 * curve), 4 * rate) if curve > 0 else 4 * rate
        if 0.5 < best / rate < 2:
            return value, moved
        other = self.at(here + best * step, here)
        return other if other[0] < value else (value, moved)

    def at(self, point: Tensor, here: Tensor) -> tuple[float, Tensor]:
        """(f, the way from here) at the point within bounds next to ``point``."""
        self.walk.put(point)
        return self.walk.value(), self.walk.vector() - here


class LBFGSMemory:
    """Pairs (s, y) of how x and its gradient have moved, and the direction -H g that they make of a gradient.

    Args:
        memory: how many pairs are kept.

    Example:
        >>> import torch
        >>> bends = LBFGSMemory(2)
        >>> for s in torch.eye(2):
        ...     bends.add(s, torch.tensor([1.0, 100.0]) * s)
        >>> bends.direction(torch.tensor([1.0, 100.0]), torch.tensor([True, True]))  # of x^2 / 2 + 50 y^2 at (1, 1)
        tensor([-1., -1.])

    References: Nocedal 1980; Liu & Nocedal 1989, Algorithm 2.1.
    """

    def __init__(self, memory: int) -> None:
        self.pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)

    def add(self, s: Tensor, y: Tensor) -> None:
        """Add a step s and the change y of the gradient along it; a pair without positive curvature is left out."""
        if float(s @ y) > 1e-10 * float(s.norm()) * float(y.norm()):
            self.pairs.append((s, y))

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """-H g among the elements that are free to move; None before there is a pair.

        Args:
            gradient: g [d].
            free: bool [d].
        """
        pairs = [(s * free, y * free) for s, y in self.pairs]
        pairs = [(s, y) for s, y in pairs if float(s @ y) > 0]
        if not pairs:
            return None
        direction, shares = -gradient * free, []
        for s, y in reversed(pairs):
            shares.append(float(s @ direction) / float(s @ y))
            direction = direction - shares[-1] * y
        s, y = pairs[-1]
        direction = direction * (float(s @ y) / float(y @ y))
        for (s, y), share in zip(pairs, reversed(shares), strict=True):
            direction = direction + (share - float(y @ direction) / float(s @ y)) * s
        return direction
