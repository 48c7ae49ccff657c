"""The zeroth-order search as a sampler of Optuna: two-point differences along random directions of the unit cube."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from zoft.blackbox.minimizer import Minimizer
from zoft.noise.counter import random_words
from zoft.noise.direction import Direction, key_of
from zoft.tuning.space import SearchSpace, Values, key

SPREAD = 4
"""Points that the search begins with: the start, and others spread over the cube."""

_RADIUS = 0.05  # first step, in units of the cube's half diagonal times two: each query is about 0.2 away in each axis
_SHRINK = 0.7  # of the radius, when the search is begun anew at a lower point
_STALE = 3  # blocks without a new point, after which one is taken from elsewhere
_MOST_KNOWN = 500  # blocks in a row that hold known points only, after which nothing new is expected


class ZOSampler(BaseSampler):
    """Two-point differences along random directions, from the best of a few first points.

    :class:`zoft.Minimizer` as for a noisy function: f is asked at both ends of a random direction, several times as
    far away as the step is long; steps grow while they agree and shrink while they do not. No value decides about a
    step, so a rough loss does no harm. Where a query finds the lowest value so far, the search begins anew there with a
    smaller radius.

    What it proposes is a function of the space, the seed and the values of the trials so far: it keeps nothing that is
    not in the study, so a study that was loaded again goes on as if it had not been interrupted.

    Args:
        space: what is searched; names and forms as in :class:`zoft.tuning.space.SearchSpace`.
        seed: of the directions.
        batch: trials that run side by side; half as many directions are taken a step, and one at least.
        x0: where to begin; the middle of what it leaves open.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> study = optuna.create_study(sampler=ZOSampler({"x": "uniform(-1,1)"}))
        >>> study.optimize(lambda trial: (trial.suggest_float("x", -1, 1) - 0.3) ** 2, n_trials=30)
        >>> abs(study.best_params["x"] - 0.3) < 0.05
        True
    """

    def __init__(
        self, space: Mapping[str, Any] | SearchSpace, *, seed: int = 0, batch: int = 1, x0: Values | None = None
    ) -> None:
        self.space = space if isinstance(space, SearchSpace) else SearchSpace(space)
        self.seed = seed
        self.num_directions = max(1, batch // 2)
        self.start = self.space.units(x0)
        self.radius = 4 * _RADIUS * math.sqrt(self.space.width)  # the search's unit is a quarter of the cube's side
        self.lowest = math.inf
        self.known: dict[str, float] = {}  # values of finished points; a failed one counts as the worst
        self.search: Minimizer | None = None
        self.num_begun = self.num_stale = self.num_spread = 0
        self._taken: dict[str, int] = {}  # key of a point -> the trial that has it
        self._lock = threading.Lock()  # Optuna's n_jobs are threads
        self.is_of_search = False  # whether the block is the Minimizer's
        self.block = [self.start, *(self._elsewhere() for _ in range(SPREAD - 1))]

    # ---- What Optuna asks --------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of the space."""
        return self.space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point of the block that no trial has; one from elsewhere where all of them are under way."""
        with self._lock:
            known = known_values(study, self.space)
            # points that were asked for and not answered yet are under way in other trials
            waiting = [values for values in self.points(known) if self._taken.get(key(values)) in (None, trial.number)]
            values = waiting[0] if waiting else self.space.values(self._elsewhere())
            self._taken[key(values)] = trial.number
            return values

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that the space does not have: at random."""
        return RandomSampler(seed=self.seed).sample_independent(study, trial, param_name, param_distribution)

    # ---- The search --------------------------------------------------------------------------------------------------

    def points(self, known: Mapping[str, float]) -> list[Values]:
        """The points of the block under way that are still to be evaluated; none where nothing new is left.

        Args:
            known: key of a point -> its value, lower is better; NaN for one that failed.
        """
        for _ in range(_MOST_KNOWN):
            block = {key(values): values for values in map(self.space.values, self.block)}
            missing = {name: values for name, values in block.items() if name not in known}
            # missing points first: a step is taken when all of its block are known
            if missing:
                return list(missing.values())
            self._tell(known)
            self.block = self._next()
        return []

    def _tell(self, known: Mapping[str, float]) -> None:
        names = [key(self.space.values(u)) for u in self.block]
        self.num_stale = 0 if any(name not in self.known for name in names) else self.num_stale + 1
        for name in names:
            # a failed point counts as bad as the worst so far, so that the search turns away from it
            worst = max(self.known.values(), default=0.0)
            self.known.setdefault(name, worst if math.isnan(known[name]) else known[name])
        losses = [self.known[name] for name in names]
        best = min(range(len(losses)), key=lambda i: losses[i])
        if losses[best] < self.lowest:
            # a lower point than any: the search begins anew there, with a smaller radius
            self.lowest, self.start, self.search = losses[best], self.block[best], None
            self.radius *= _SHRINK if self.is_of_search else 1
        elif self.is_of_search and self.search is not None:
            self.search.tell(losses)

    def _next(self) -> list[list[float]]:
        """Both ends of each direction of a step, or where a step has led; a point from elsewhere after stale blocks."""
        # blocks of known points only: the search goes round in a grid's cell
        self.is_of_search = self.num_stale < _STALE
        if not self.is_of_search:
            self.num_stale = 0
            return [self._elsewhere()]
        if self.search is None or self.search.done:
            self.search = Minimizer(
                self.start,
                budget=1_000_000,  # who asks decides when it is enough
                bounds=(0.0, 1.0),
                noisy=True,
                estimator="central",
                num_directions=self.num_directions,
                radius=self.radius,
                seed=self.seed + 1000 * self.num_begun,
            )
            self.num_begun += 1
        return [[float(number) for number in x] for x in self.search.ask()]

    def _elsewhere(self) -> list[float]:
        """The next point of a sequence that fills the cube evenly (Roberts 2018: the R sequence), shifted by the seed.

        Its steps are the powers of 1 / phi, with phi^(d + 1) = phi + 1.
        """
        d, phi = self.space.width, 2.0
        for _ in range(40):
            # phi^(d + 1) = phi + 1, by iteration from 2
            phi = (1 + phi) ** (1 / (d + 1))
        self.num_spread += 1
        shift = uniform(self.seed, 0, d)
        # x_i = shift_i + n phi^-i mod 1: each new point falls into the largest gap
        return [(shift[i] + self.num_spread * phi ** -(i + 1)) % 1.0 for i in range(d)]


UNCOUNTED = "uncounted"
"""Attribute of a study: numbers of trials that do not count, as their point was asked again."""


def known_values(study: Study, space: SearchSpace) -> dict[str, float]:
    """Key of a point -> its value in a study, lower is better; NaN where it failed."""
    besides = study.user_attrs.get(UNCOUNTED, [])
    # Optuna maximises or minimises; here lower is better
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    known = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in besides and trial.params.keys() >= space.parameters.keys():
            failed = trial.state == TrialState.FAIL or trial.value is None
            known[key(space.rounded(trial.params))] = math.nan if failed else sign * float(trial.value or 0.0)
    return known


def uniform(seed: int, number: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1), the same for the same seed and number.

    Example:
        >>> uniform(0, 1, 2) == uniform(0, 1, 2) != uniform(0, 2, 2)
        True
    """
    words = random_words(key_of(Direction(seed, number), "tune"), 0, count).tolist()
    return [(word % 2**32) / 2**32 for word in words]
