"""Fault 9: a point where f fails is a worse one; the search ends at the minimum and reports f of that very point."""

from __future__ import annotations

import math

import numpy as np
import pytest

import zoft

REGIONS = {
    "right": lambda x: x[0] > 3,
    "near": lambda x: x[0] > 1.2,
    "behind": lambda x: x[0] < -0.1,
    "corner": lambda x: x[0] + x[1] > 3.5,
    "round": lambda x: (x[0] - 1) ** 2 + (x[1] - 2) ** 2 > 5.3,
    "kink": lambda x: x[1] > 2.1,
}
OPTIMUM = np.array([1.0, 2.0])


def true(x) -> float:
    return float((x[0] - 1) ** 2 + abs(x[1] - 2))


class Failing:
    """(x0 - 1)^2 + |x1 - 2| + noise, which fails in a region."""

    def __init__(self, region: str = "right", noise: float = 0.01, how: str = "raise", seed: int = 0) -> None:
        self.fails, self.noise, self.how = REGIONS[region], noise, how
        self.generator = np.random.default_rng(seed + 1000)

    def __call__(self, x) -> float:
        if self.fails(x):
            if self.how == "raise":
                raise RuntimeError("no such place")
            return float(self.how)
        return true(x) + self.noise * float(self.generator.standard_normal())


def off(result) -> float:
    return float(np.abs(result.x - OPTIMUM).max())


@pytest.mark.parametrize("seed", range(10))
def test_fault_9_the_example_ends_at_the_optimum(seed):
    result = zoft.minimize(Failing(seed=seed), np.zeros(2), budget=300, seed=seed)
    assert off(result) < 0.05
    assert result.fun == pytest.approx(true(result.x), abs=0.015)
    assert result.success
    assert result.num_queries <= 300


@pytest.mark.parametrize("seed", range(10))
def test_fault_9_five_times_the_noise(seed):
    result = zoft.minimize(Failing(noise=0.05, seed=seed), np.zeros(2), budget=300, seed=seed)
    assert off(result) < 0.05
    assert result.fun == pytest.approx(true(result.x), abs=0.03)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "sign"])
def test_fault_9_a_given_rate_that_is_too_long_comes_back_from_where_f_fails(optimizer):
    """It stayed there, and ended as failed after twenty steps at all of whose points f fails."""
    for seed in range(4):
        result = zoft.minimize(
            Failing("near", 0.01, "nan", seed), np.zeros(2), budget=600, seed=seed, estimator="central", eps=0.1,
            num_directions=4, optimizer=optimizer, learning_rate=0.3, schedule="linear",
        )  # fmt: skip
        assert result.status == "budget"
        assert off(result) < 0.1


@pytest.mark.parametrize("how", ["raise", "nan", "inf", "-inf"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.01])
@pytest.mark.parametrize("region", REGIONS)
def test_fault_9_wherever_and_however_it_fails(region, noise, how):
    for seed in range(2):
        result = zoft.minimize(Failing(region, noise, how, seed), np.zeros(2), budget=300, seed=seed)
        assert off(result) < 0.05
        assert result.fun == pytest.approx(true(result.x), abs=2 * noise + 1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("bounds", [{"bounds": (-5.0, 5.0)}, {"bounds": (-5.0, 5.0), "bounds_by": "reparameterize"}])
def test_fault_9_within_bounds(bounds, noise):
    for seed in range(3):
        result = zoft.minimize(Failing(noise=noise, seed=seed), np.zeros(2), budget=300, seed=seed, **bounds)
        assert off(result) < 0.08
        assert result.fun == pytest.approx(true(result.x), abs=2 * noise + 1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    "parts",
    [
        *({"estimator": name} for name in ("central", "three_point", "leave_one_out")),
        {"estimator": "central", "num_directions": 4},
        {"estimator": "one_sided", "subspace": "coordinate"},
        {"estimator": "central", "num_directions": 4, "weighting": "loss_std"},
        {"estimator": "central", "num_directions": 4, "optimizer": "sign"},
    ],
    ids=lambda parts: "-".join(map(str, parts.values())),
)
def test_fault_9_every_composition_gets_nearer_and_says_where_it_is(parts, noise):
    for region in ("right", "near"):
        result = zoft.minimize(Failing(region, noise, "nan"), np.zeros(2), budget=600, **parts)
        assert result.fun == pytest.approx(true(result.x), abs=2 * noise + 1e-9)
        assert true(result.x) < 1.0  # 3 at the start


@pytest.mark.parametrize("estimator", ["central", "one_sided"])
def test_fault_9_a_given_learning_rate_walks_out_of_the_region(estimator):
    """The textbook's iteration from a place beside the region, with queries that reach far into it."""
    for seed in range(3):
        f = Failing("near", 0.01, "nan", seed)
        result = zoft.minimize(
            f, np.array([1.15, 0.0]), budget=600, seed=seed, estimator=estimator, num_directions=4,
            eps=0.1, learning_rate=0.05, schedule="linear",
        )  # fmt: skip
        assert result.success
        assert off(result) < 0.5
        assert result.fun == pytest.approx(true(result.x), abs=0.02)


@pytest.mark.parametrize("every", [3, 7])
def test_fault_9_failures_by_chance_do_not_end_the_search(every):
    calls = []

    def f(x):
        calls.append(x)
        if len(calls) > 3 and not len(calls) % every:
            return math.nan
        return float(((x - 1) ** 2).sum()) + 1e-3 * math.sin(1e9 * len(calls))

    result = zoft.minimize(f, np.full(3, 4.0), budget=400)
    assert np.abs(result.x - 1).max() < 0.05
    assert result.num_queries == len(calls)


def test_fault_9_f_that_fails_for_good_is_reported_where_it_did_not():
    calls = []

    def f(x):
        calls.append(x)
        if len(calls) > 60:
            raise OSError("gone")
        return true(x) + 0.01 * math.sin(1e9 * len(calls))

    result = zoft.minimize(f, np.zeros(2), budget=300)
    assert not result.success
    assert result.fun == pytest.approx(true(result.x), abs=0.02)


@pytest.mark.parametrize("how", ["callback", "interrupt"])
def test_fault_9_whoever_ends_the_search_the_value_is_that_of_the_point(how):
    f, steps = Failing(), []

    def callback(result):
        steps.append(result)
        if len(steps) == 5:
            if how == "interrupt":
                raise KeyboardInterrupt
            return True
        return False

    end = zoft.minimize(f, np.zeros(2), budget=300, callback=callback)
    assert end.status == {"callback": "callback", "interrupt": "interrupted"}[how]
    assert end.fun == pytest.approx(true(end.x), abs=0.04)


def test_fault_9_a_lucky_value_does_not_reach_the_target():
    for seed in range(4):
        result = zoft.minimize(Failing(noise=0.3, seed=seed), np.zeros(2), budget=300, seed=seed, target=-0.2)
        assert result.status == "budget"
        result = zoft.minimize(Failing(noise=0.01, seed=seed), np.zeros(2), budget=300, seed=seed, target=0.2)
        assert result.status == "target"
        assert true(result.x) < 0.23
