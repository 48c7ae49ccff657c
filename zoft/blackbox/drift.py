"""The pace for a noisy function."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zoft.blackbox.walk import Walk

if TYPE_CHECKING:
    from zoft.blackbox.minimizer import Minimizer


EPS = 4.0
AVERAGE = 0.0


class Drift:
    def __init__(self, walk: Walk, host: Minimizer, radius: float, fixes_eps: bool = False) -> None:
        self.walk, self.host, self.fixes_eps, self.radius = walk, host, fixes_eps, radius

    def run(self) -> None:
        from zoft.blackbox.search import finish, count_failed, reserve
        walk, host = self.walk, self.host
        d = walk.session.weights.num_elements
        kept = min(16, 1 + host.budget // 20)
        failed = 0
        last = None
        c = 1 / (1 + d**0.5 / 2)
        path = None
        trail = []
        while True:
            eps = walk.method.estimator.radius if self.fixes_eps else EPS * self.radius / d**0.5
            estimator = walk.fitting(walk.with_eps(eps), host.left - kept)
            if estimator is None:
                if AVERAGE and trail:
                    n = max(1, int(len(trail) * AVERAGE))
                    walk.put(sum(trail[-n:]) / n)
                finish(walk, host, True)
            asked = walk.ask(estimator)
            if not asked.usable:
                failed = count_failed(failed)
                self.radius /= 2
                host.note_step(walk.session.at(), math.nan, 0.0, estimator.radius, 0.0)
                continue
            failed = 0
            before = walk.vector()
            step = walk.write(1.0, project=False)
            size = float(step.norm())
            if size:
                unit = step / size
                path = unit if path is None else (1 - c) * path + math.sqrt(c * (2 - c)) * unit
                self.radius *= math.exp(min(1.0, c * (float(path @ path) - 1)))
                walk.put(before + unit * self.radius)
            moved = walk.vector() - before
            trail.append(walk.vector())
            host.note_step(walk.session.at(), asked.loss, self.radius / size if size else 0.0, estimator.radius, float(moved.norm()))
