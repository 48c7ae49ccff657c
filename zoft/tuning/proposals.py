"""Who says which point is next: zeroth-order search, random search, or Optuna's TPE; ask, then tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from zoft.errors import UserError
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import random_words
from zoft.tuning.parameters import Choice, Int, Log, LogInt, SearchSpace, Uniform, Values, key, written

SEARCHES = ("zo", "random", "tpe")
"""What a search may be."""

SPREAD = 4
"""Points that a zeroth-order search begins with: the start, and others spread over the cube."""

_RADIUS = 0.05  # first step, in units of the cube's half diagonal times two: each query is about 0.2 away in each axis
_SHRINK = 0.7  # of the radius, when the search is begun anew at a lower point
_STALE = 3  # blocks without a new point, after which one is taken from elsewhere


class Random:
    """Independent uniform points of the cube.

    Args:
        space: what is searched.
        seed: of the points.
        batch: how many are asked for at a time.
        x0: not used: every point is drawn.
    """

    def __init__(self, space: SearchSpace, seed: int, batch: int, x0: Values | None = None) -> None:
        del x0
        self.space, self.seed, self.batch, self.asked = space, seed, batch, 0

    def ask(self) -> list[Values]:
        """The next points."""
        numbers = range(self.asked, self.asked + self.batch)
        self.asked += self.batch
        return [self.space.values(uniform(self.seed, number, self.space.width)) for number in numbers]

    def tell(self, values: Sequence[float]) -> None:
        """Nothing is learnt."""


class ZerothOrder:
    """Two-point differences along random directions, from the best of a few first points.

    :class:`zoft.Minimizer` as for a noisy function: f is asked at both ends of a random direction, several times as
    far away as the step is long; steps grow while they agree and shrink while they do not. No value decides about a
    step, so a rough loss does no harm. Where a query finds the lowest value so far, the search begins anew there with a
    smaller radius.

    Args:
        space: what is searched.
        seed: of the directions.
        batch: points that can be evaluated side by side; half as many directions are taken a step, and one at least.
        x0: where to begin; the middle of what it leaves open.
    """

    def __init__(self, space: SearchSpace, seed: int, batch: int, x0: Values | None = None) -> None:
        self.space, self.seed = space, seed
        self.directions = max(1, batch // 2)
        self.start = space.units(x0)
        self.radius = 4 * _RADIUS * math.sqrt(space.width)  # the search's unit is a quarter of the cube's side
        self.best, self.seen = math.inf, dict[str, float]()
        self.search: Any = None
        self.begun = self.stale = self.spread = 0
        self.wanted: list[list[float]] = []
        self.from_search = False  # whether they are the Minimizer's

    def ask(self) -> list[Values]:
        """The first points; then both ends of each direction of a step, or where a step has led."""
        self.from_search = bool(self.seen) and self.stale < _STALE
        if not self.seen:
            self.wanted = [self.start, *(self._elsewhere() for _ in range(SPREAD - 1))]
        elif self.from_search:
            self.wanted = [[float(number) for number in x] for x in self._search().ask()]
        else:
            self.wanted, self.stale = [self._elsewhere()], 0
        return [self.space.values(u) for u in self.wanted]

    def tell(self, values: Sequence[float]) -> None:
        """What was found; a finite number each."""
        lowest = min(range(len(values)), key=lambda i: values[i])
        names = [key(self.space.values(u)) for u in self.wanted]
        self.stale = 0 if any(name not in self.seen for name in names) else self.stale + 1
        self.seen |= dict(zip(names, values, strict=True))
        if values[lowest] < self.best:
            self.best, self.start, self.search = values[lowest], self.wanted[lowest], None
            self.radius *= _SHRINK if self.from_search else 1
        elif self.from_search:
            self.search.tell(values)

    def _search(self) -> Any:
        from zoft.blackbox.minimizer import Minimizer

        if self.search is None or self.search.done:
            self.search = Minimizer(
                self.start,
                budget=1_000_000,  # who asks decides when it is enough
                bounds=(0.0, 1.0),
                noisy=True,
                estimator="central",
                num_directions=self.directions,
                radius=self.radius,
                seed=self.seed + 1000 * self.begun,
            )
            self.begun += 1
        return self.search

    def _elsewhere(self) -> list[float]:
        """The next point of a sequence that fills the cube evenly (Roberts 2018: the R sequence), shifted by the seed.

        Its steps are the powers of 1 / phi, with phi^(d + 1) = phi + 1.
        """
        d, phi = self.space.width, 2.0
        for _ in range(40):
            phi = (1 + phi) ** (1 / (d + 1))
        self.spread += 1
        shift = uniform(self.seed, 0, d)
        return [(shift[i] + self.spread * phi ** -(i + 1)) % 1.0 for i in range(d)]


class TPE:
    """Optuna's tree-structured Parzen estimator, which knows what a choice is.

    Args:
        space: what is searched.
        seed: of the sampler.
        batch: how many points are asked for at a time.
        x0: the first point, where one is given.

    References: Bergstra et al. 2011; Akiba et al. 2019 (Optuna).
    """

    def __init__(self, space: SearchSpace, seed: int, batch: int, x0: Values | None = None) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError("search=tpe needs a package: pip install 'zoft[tune]' (or optuna)") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
        self.study, self.batch = optuna.create_study(sampler=sampler), batch
        self.axes = {name: _distribution(optuna, parameter) for name, parameter in space.parameters.items()}
        self.space, self.trials = space, list[Any]()
        if x0:
            self.study.enqueue_trial({name: _optunas(space.parameters[name], value) for name, value in x0.items()})

    def ask(self) -> list[Values]:
        """The next points."""
        self.trials = [self.study.ask(self.axes) for _ in range(self.batch)]
        return [self._values(trial.params) for trial in self.trials]

    def tell(self, values: Sequence[float]) -> None:
        """What was found; a finite number each."""
        for trial, value in zip(self.trials, values, strict=True):
            self.study.tell(trial, value)

    def _values(self, params: dict[str, Any]) -> Values:
        values = {}
        for name, parameter in self.space.parameters.items():
            value = params[name]
            values[name] = parameter.options[value] if isinstance(parameter, Choice) else value
            if isinstance(value, float) and isinstance(parameter, Uniform):
                values[name] = parameter.rounded(value)
        return values


def proposer(search: str, space: SearchSpace, seed: int, batch: int, x0: Values | None) -> ZerothOrder | Random | TPE:
    """By name, a member of :data:`SEARCHES`."""
    kinds: dict[str, type[ZerothOrder | Random | TPE]] = {"zo": ZerothOrder, "random": Random, "tpe": TPE}
    return kinds[search](space, seed, batch, x0)


def uniform(seed: int, number: int, count: int) -> list[float]:
    """``count`` numbers in [0, 1), the same for the same seed and number.

    Example:
        >>> uniform(0, 1, 2) == uniform(0, 1, 2) != uniform(0, 2, 2)
        True
    """
    words = random_words(key_of(Direction(seed, number), "tune"), 0, count).tolist()
    return [(word % 2**32) / 2**32 for word in words]


def _distribution(optuna: Any, parameter: Any) -> Any:
    kinds = optuna.distributions
    if isinstance(parameter, Choice):
        return kinds.CategoricalDistribution(tuple(range(len(parameter.options))))
    if isinstance(parameter, Int):
        return kinds.IntDistribution(int(parameter.lower), int(parameter.upper), log=isinstance(parameter, LogInt))
    assert isinstance(parameter, Uniform)
    return kinds.FloatDistribution(parameter.lower, parameter.upper, log=isinstance(parameter, Log))


def _optunas(parameter: Any, value: Any) -> Any:
    return [*map(written, parameter.options)].index(written(value)) if isinstance(parameter, Choice) else value
