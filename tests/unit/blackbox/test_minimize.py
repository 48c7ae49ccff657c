"""minimize and its ask/tell form: what f is given, what is counted, what is kept when f fails, what is refused."""

from __future__ import annotations

import math
import random
import threading
import time

import numpy as np
import pytest
import torch

import zoft
from zoft.blackbox.calls import NotANumberError, NotFiniteError
from zoft.errors import UserError
from zoft.estimators.central import Central
from zoft.estimators.one_point import OnePoint
from zoft.estimators.one_sided import OneSided
from zoft.noise.direction import Direction
from zoft.optimizers.sgd import SGD
from zoft.subspaces.coordinate import Coordinate
from zoft.subspaces.full import Full

CENTRE = np.array([1.0, -2.0, 0.5])


def bowl(x):
    return float(((np.asarray(x) - CENTRE) ** 2).sum())


class Counted:
    """f, with what it was asked."""

    def __init__(self, f=bowl):
        self.f, self.asked = f, []

    def __call__(self, x):
        self.asked.append(x)
        return self.f(x)


# ------------------------------------------------------------------------------------------------------ what x may be


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_f_and_the_result_see_the_form_of_x0(dtype, kind):
    x0 = np.zeros((3, 1), dtype)
    x0 = torch.from_numpy(x0) if kind == "torch" else x0
    before = x0 + 0
    f = Counted(lambda x: float(((torch.as_tensor(x).double().view(-1) - torch.from_numpy(CENTRE)) ** 2).sum()))
    result = zoft.minimize(f, x0, budget=60)
    assert {(type(x), x.dtype, x.shape) for x in [*f.asked, result.x]} == {(type(x0), x0.dtype, x0.shape)}
    assert (x0 == before).all()
    assert result.fun == f.f(result.x) < 0.05


def test_a_dict_keeps_its_kinds_and_a_mutating_f_harms_nothing():
    x0 = {"layer.weight": torch.zeros(2, 2), "bias": np.zeros(2, np.float32), "c": 3.0, "list": [1, 2]}

    def f(x):
        value = sum(float((torch.as_tensor(v).double() - 1).square().sum()) for v in x.values())
        for v in x.values():
            v *= 0  # f may do with its x what it likes
        return value

    result = zoft.minimize(f, x0, budget=400)
    assert [type(v) for v in result.x.values()] == [torch.Tensor, np.ndarray, np.ndarray, np.ndarray]
    assert result.x["layer.weight"].dtype == torch.float32
    assert result.x["list"].dtype == np.float64
    assert result.x["c"].shape == ()
    assert f(result.x) == result.fun < 1e-5
    assert not x0["layer.weight"].any()
    assert x0["list"] == [1, 2]


@pytest.mark.parametrize(
    "settings", [{}, {"learning_rate": 0.01}, {"eps": 1e-3}, {"subspace": "low_rank"}, {"bounds": (-99, 99)}]
)
def test_the_order_in_memory_does_not_count(settings):
    rows, columns = np.arange(12.0).reshape(4, 3), np.asfortranarray(np.arange(12.0).reshape(4, 3))
    expected = zoft.minimize(bowl, rows, budget=100, **settings).x
    for x0 in (columns, torch.from_numpy(columns), torch.arange(12.0).double().view(4, 3)):
        assert np.array_equal(np.asarray(zoft.minimize(bowl, x0, budget=100, **settings).x), expected)
    like_it = {"scale": np.asfortranarray(rows + 1), "bounds": (columns - 9, columns + 9)}
    assert zoft.minimize(bowl, columns, budget=100, **{**settings, **like_it}).success


@pytest.mark.parametrize(
    ("x0", "words"),
    [
        ([], "x0 is empty"),
        ({}, "empty dict"),
        ({1: [0.0]}, "keys of x0 must be strings"),
        (np.zeros(2, int), r"int64.*astype\(float\)"),
        (torch.zeros(2, dtype=torch.int32), r"int32.*float\(\)"),
        (np.zeros(2, complex), "complex128"),
        ("x", "array of floats"),
        ([0.0, math.nan], "not finite"),
    ],
)
def test_an_x0_that_is_none_is_refused(x0, words):
    with pytest.raises(UserError, match=words):
        zoft.minimize(bowl, x0)


# -------------------------------------------------------------------------------------------------- the textbook forms


def by_hand(f, x0, name, steps, lr, h, law="gaussian", q=1):
    """x <- x - lr g, with g written down as in a textbook; the directions are those of the seed."""
    d, x = len(x0), np.array(x0)
    space = Coordinate() if law == "coordinate" else Full(law=law)
    module = torch.nn.Module()
    module._parameters["x"] = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    coordinates = space.bind(zoft.blackbox.space.Weights(module))
    coordinates.arrange("iid", q)
    for step in range(steps):
        us = [coordinates.z(Direction(0, step, j), "x").double().numpy() for j in range(q)]
        slope = {
            "one_sided": lambda u, x=x: (f(x + h * u) - f(x)) / h,
            "central": lambda u, x=x: (f(x + h * u) - f(x - h * u)) / (2 * h),
            "one_point": lambda u, x=x: f(x + h * u) / h,
        }[name]
        x = x - lr * np.mean([slope(u) * u for u in us], axis=0)
    return x


@pytest.mark.parametrize("name", ["one_sided", "central", "one_point"])
@pytest.mark.parametrize("law", ["gaussian", "sphere", "coordinate"])
def test_textbook_forms(name, law):
    q, h, lr = (3, 0.05, 0.02) if law == "coordinate" else (1, 0.1, 0.003)
    lr = 1e-4 if name == "one_point" else lr  # its estimates are long
    estimator = {"one_sided": OneSided, "central": Central}.get(name, lambda **k: OnePoint(feedback=False, **k))
    each = {"one_sided": q + 1, "central": 2 * q, "one_point": q}[name]
    f, ends = Counted(), []
    result = zoft.minimize(
        f,
        np.ones(3),
        estimator=estimator(eps=h, num_directions=q),
        subspace="coordinate" if law == "coordinate" else Full(law=law),
        learning_rate=lr,
        budget=1 + 8 * each - (name == "one_sided") + 1,  # f(x0), which is no news to the first step; 8 steps; the end
        noisy=False,
        callback=lambda now: ends.append(now.num_steps),
    )
    expected = by_hand(bowl, np.ones(3), name, ends[-1], lr, h, law, q)
    np.testing.assert_allclose(f.asked[-1], expected, rtol=1e-5)  # the last query is where the search ends
    assert result.num_queries == len(f.asked) == 1 + 8 * each - (name == "one_sided") + 1


def test_a_sweep_over_the_coordinates_is_the_gradient():
    a = np.array([3.0, 1.0, 5.0, 2.0])
    for name, bias, budget in (("central", 0.0, 10), ("one_sided", 1e-3 * a, 6)):  # sqrt(d) h a / 2 of a x^2 / 2
        f = Counted(lambda x: float((a * x * x / 2).sum()))
        x0 = np.array([1.0, -1.0, 2.0, 0.3])
        zoft.minimize(
            f, x0, estimator=name, subspace="coordinate", eps=1e-3, learning_rate=0.1, budget=budget, noisy=False
        )
        error = (x0 - f.asked[-1]) / 0.1 - a * x0
        np.testing.assert_allclose(np.abs(error), bias, atol=1e-6)


# ------------------------------------------------------------------------------------------------- counting and course


@pytest.mark.parametrize("noisy", [False, True, None])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimator": "central", "num_directions": 4},
        {"estimator": "central", "num_directions": 4, "learning_rate": 0.05, "schedule": "cosine"},
        {"estimator": "one_point", "eps": 0.1, "learning_rate": 1e-3},
        {"optimizer": "adam", "estimator": "leave_one_out", "subspace": "full"},
        {"optimizer": "conservative", "learning_rate": 0.01},
        {"subspace": "coordinate", "estimator": "one_sided", "optimizer": "momentum"},
    ],
)
def test_the_budget_is_kept_and_every_call_is_counted(settings, noisy):
    for budget in (15, 16, 97):
        f, seen = Counted(), []
        result = zoft.minimize(
            f, np.zeros(3), budget=budget, noisy=noisy, callback=lambda r, s=seen: s.append(r), **settings
        )
        assert result.num_queries == len(f.asked) <= budget
        assert result.status in ("budget", "converged"), result
        assert len(result.history) == result.num_steps == len(seen)
        if not noisy:
            assert result.fun == bowl(result.x) == min(map(bowl, f.asked))


def test_generators_are_untouched_and_the_seed_says_all():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    runs = [zoft.minimize(bowl, np.zeros(3), estimator="central", budget=50, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].history == runs[1].history
    assert runs[0].history != runs[2].history
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_ask_and_tell_is_the_same_search():
    whole = zoft.minimize(bowl, np.zeros(3), budget=100)
    search = zoft.Minimizer(np.zeros(3), budget=100)
    answers = []
    while not search.done:
        points = search.ask()
        assert all((a == b).all() for a, b in zip(points, search.ask(), strict=True))
        answers.append([bowl(x) for x in points])
        search.tell(answers[-1])
    assert search.result().history == whole.history
    with pytest.raises(UserError, match="the search is done"):
        search.ask()
    resumed = zoft.Minimizer(np.zeros(3), budget=100)  # told what a log says, it is where the other one was
    for values in answers[:3]:
        resumed.ask()
        resumed.tell(values)
    assert resumed.result().history == whole.history[: resumed.result().num_steps]
    with pytest.raises(UserError, match=r"needs .* values"):
        resumed.ask() and resumed.tell([0.0] * 99)


@pytest.mark.parametrize("settings", [{"workers": 3}, {"vectorized": True}, {"workers": 2, "parallel": "processes"}])
def test_workers_and_batches_change_nothing(settings):
    f = (lambda xs: ((xs - CENTRE) ** 2).sum(1)) if settings.get("vectorized") else bowl
    plain = zoft.minimize(lambda x: float(bowl(x)), np.zeros(3), estimator="central", num_directions=4, budget=60)
    if settings.get("parallel"):
        f = abs_of_first
        plain = zoft.minimize(f, np.array([2.0]), estimator="central", num_directions=2, budget=30)
        other = zoft.minimize(f, np.array([2.0]), estimator="central", num_directions=2, budget=30, **settings)
    else:
        other = zoft.minimize(f, np.zeros(3), estimator="central", num_directions=4, budget=60, **settings)
    assert other.history == plain.history


abs_of_first = abs  # pickles, and needs no module of the tests in the other process


def test_threads_run_at_the_same_time():
    meet = threading.Barrier(4, timeout=5)

    def f(x):
        if len(seen):
            meet.wait()
        seen.append(threading.get_ident())
        time.sleep(0.001)
        return bowl(x)

    seen = []
    zoft.minimize(
        f,
        np.zeros(3),
        estimator="central",
        num_directions=2,
        learning_rate=0.1,
        budget=10,
        noisy=False,
        workers=4,
        callback=lambda r: r.num_steps == 2,
    )
    assert len(set(seen[1:])) == 4


def test_values_that_are_rounded_to_float32_are_no_obstacle():
    result = zoft.minimize(lambda x: float(np.float32(7 + bowl(x))), np.zeros(3), budget=400)
    assert bowl(result.x) < 1e-5


@pytest.mark.parametrize("d", [1, 10])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_left_alone_it_finds_the_minimum_whatever_the_scale(d, noise):
    random, bends = np.random.default_rng(d), np.geomspace(1, 10, d)
    for u in (1e-3, 1e3):
        f = lambda x, u=u: float(bends @ (x / u - 1) ** 2) + noise * random.standard_normal()  # noqa: E731
        x0 = np.full(d, 0.3 * u if noise else 0.0)  # where nothing tells the scale, noise hides all slopes
        result = zoft.minimize(f, x0, budget=100 + 60 * d, noisy=noise > 0)
        assert float(bends @ (result.x / u - 1) ** 2) < (1e-6 if not noise else 0.05) * bends.sum()


def test_kinks_do_not_hold_it_up():
    result = zoft.minimize(lambda x: float(np.abs(x - CENTRE).max()), np.zeros(3), budget=600)
    assert result.fun < 1e-3


def test_target_and_callback_stop_it():
    result = zoft.minimize(bowl, np.zeros(3), budget=500, target=0.1)
    assert (result.status, result.success) == ("target", True)
    assert result.fun <= 0.1
    result = zoft.minimize(bowl, np.zeros(3), budget=500, callback=lambda now: now.num_steps == 2)
    assert (result.status, result.num_steps) == ("callback", 2)


# --------------------------------------------------------------------------------------------------------------- bounds

BOX = np.array([0.5, -1.0, -1.0]), np.array([2.0, 1.0, 0.25])


@pytest.mark.parametrize("bounds_by", ["projection", "reparameterize"])
@pytest.mark.parametrize(
    "bounds",
    [
        BOX,
        list(zip(*BOX, strict=True)),
        np.stack(BOX, 1),
        [(0.5, None), (-1, None), (None, 0.25)],
        (np.array([0.5, -1.0, -np.inf]), np.array([np.inf, np.inf, 0.25])),
    ],
)
def test_f_is_never_called_out_of_bounds(bounds, bounds_by):
    edge = [0.5, 1.0, 0.25] if bounds_by == "projection" else [1.0, 0.5, 0.0]
    for noisy, x0 in ((False, [1.0, 0.5, 0.0]), (True, edge)):
        f = Counted()
        result = zoft.minimize(f, np.array(x0, np.float32), bounds=bounds, bounds_by=bounds_by, budget=300, noisy=noisy)
        asked = np.array(f.asked, float)
        for low, high, column in zip([0.5, -1, -np.inf], [np.inf, np.inf, 0.25], asked.T, strict=True):
            assert low <= column.min()
            assert column.max() <= high
        np.testing.assert_allclose(result.x, [1.0, -1.0, 0.25], atol=0.05 if noisy else 2e-3)


def test_bounds_of_a_dict_and_fixed_elements():
    x0 = {"a": np.array([0.3, 0.7]), "b": np.zeros(2)}
    f = Counted(lambda x: float(x["a"].sum() ** 2 + ((x["b"] - 3) ** 2).sum()))
    result = zoft.minimize(f, x0, bounds={"a": [(0.3, 0.3), (0.1, 1.0)], "b": (None, 2.0)}, budget=200)
    assert all(x["a"][0] == 0.3 for x in f.asked)
    np.testing.assert_allclose(result.x["a"], [0.3, 0.1], atol=1e-6)
    np.testing.assert_allclose(result.x["b"], 2.0, atol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0.0, 1.0), "out of bounds: element 0 is -3, and its bounds are 0 and 1"),
        ((5.0, 1.0), "bounds cross at element 0"),
        ((np.zeros(2), None), "lower bound must be a number or have the shape"),
        ([(0, 1)], "list of 3 pairs"),
        ((0, 1, 2), "tuple are"),
        ("all", "tuple"),
        ((math.nan, 1.0), "NaN"),
        ({"y": (0, 1)}, "keys y"),
        ((-3.0, -3.0), "nothing to move"),
    ],
)
def test_bounds_that_make_no_sense(bounds, words):
    with pytest.raises(UserError, match=words):
        zoft.minimize(bowl, np.full(3, -3.0), bounds=bounds)


# ----------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("bad", "error"),
    [(lambda x: math.nan, NotFiniteError), (lambda x: 1 / 0, ZeroDivisionError), (lambda x: x, NotANumberError)],
)
@pytest.mark.parametrize("noisy", [False, True])
def test_failed_queries_are_counted_and_told_with_their_point(bad, error, noisy):
    f = Counted(lambda x: bad(x) if len(f.asked) % 7 == 5 else bowl(x))
    result = zoft.minimize(f, np.full(3, 4.0), estimator="central", num_directions=2, budget=400, noisy=noisy)
    assert result.num_queries == len(f.asked)
    assert result.num_failed == len(range(4, result.num_queries, 7))
    assert isinstance(result.failures[0].error, error)
    assert result.failures[0].query == 4
    assert "queries failed; the first: query 4 at x =" in result.message
    assert result.fun < 1


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 0.1}, {"noisy": True}])
def test_an_f_that_fails_for_good_ends_the_search_and_keeps_the_best(settings):
    f = Counted(lambda x: bowl(x) if len(f.asked) < 50 else [1, 2])
    result = zoft.minimize(f, np.zeros(3), budget=5000, **settings)
    assert (result.success, result.status) == (False, "failed")
    assert result.num_queries < 1000
    assert math.isfinite(result.fun)
    assert "In 20 steps in a row a query failed" in result.message


def test_an_interrupt_keeps_the_best():
    def f(x):
        if len(counted.asked) == 30:
            raise KeyboardInterrupt
        return bowl(x)

    counted = Counted(f)
    result = zoft.minimize(counted, np.zeros(3), budget=500)
    assert (result.success, result.status) == (False, "interrupted")
    assert result.fun == min(map(bowl, counted.asked[:-1]))


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x, r"one finite number at x0.*query 0 at x = array\(\[0., 0., 0.\]\): .*shape \(3,\)"),
        (lambda x: None, "None"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda x: math.inf, "inf"),
        (lambda x: 10**5000, "an integer beyond float64"),
        (lambda x: 1 + 2j, r"\(1\+2j\)"),
        (lambda x: torch.ones((), dtype=torch.complex64), r"tensor\(1"),
        (3.0, "f must be a function"),
    ],
)
def test_an_f_that_gives_nothing_at_x0(f, words):
    with pytest.raises(UserError, match=words):
        zoft.minimize(f, np.zeros(3))


def test_bfloat16_is_a_number():
    for f, vectorized in ((lambda x: x.square().sum(), False), (lambda xs: xs.square().sum(1), True)):
        start = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
        result = zoft.minimize(f, start, budget=100, vectorized=vectorized)
        assert result.fun < 1
        assert not result.failures


def test_points_of_a_vectorised_f_fail_one_by_one():
    result = zoft.minimize(lambda xs: [10**400 if x[0] > 0.5 else bowl(x) for x in xs], np.zeros(3), vectorized=True)
    assert result.success
    for values in ([[1], [1, 2]], [None], [1j]):
        with pytest.raises(UserError, match="one finite number at x0"):
            zoft.minimize(lambda xs, values=values: values, np.zeros(3), vectorized=True)


def test_a_vectorised_f_must_give_a_number_for_each_point():
    with pytest.raises(UserError, match=r"of 1 points it returned an array of shape \(1, 3\)"):
        zoft.minimize(lambda xs: xs, np.zeros(3), vectorized=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 1e-17}, "below the resolution of float64 at element 0 of x0, which is 1: .* raise eps to"),
        ({"estimator": Central(eps=1e-20), "learning_rate": 0.1}, "below the resolution"),
        ({"estimator": "centrall"}, "no estimator called 'centrall'. Did you mean central"),
        ({"subspace": "ful"}, "no subspace called"),
        ({"optimizer": 3}, "optimizer must be a name or a component, got int"),
        ({"optimizer": Central()}, "optimizer= takes a part that inherits from Optimizer"),
        ({"estimator": "central", "num_directions": 600}, "budget=1000 is less than one step costs"),
        ({"budget": 0}, "budget must be"),
        ({"budget": 1.5}, "budget must be"),
        ({"estimator": Central(), "eps": 1e-3}, "eps belongs to the estimator"),
        ({"estimator": "forward_gradient"}, "needs derivatives"),
        ({"estimator": "backprop"}, "needs derivatives"),
        ({"estimator": "svrg"}, "needs batches"),
        ({"estimator": "per_example"}, "for each example"),
        ({"optimizer": "conservative"}, "give learning_rate"),
        ({"optimizer": SGD(learning_rate=0.1), "learning_rate": 0.1}, "given twice"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"schedule": "linear"}, "schedule=linear is that of a given"),
        ({"learning_rate": 0.1, "radius": 1.0}, "drop one"),
        ({"radius": 0.0}, "radius must be"),
        ({"bounds_by": "clip"}, "bounds_by must be one of"),
        ({"bounds_by": "reparameterize"}, "without bounds"),
        ({"scale": 0.0}, "scale must be > 0"),
        ({"scale": np.ones(4)}, "scale must be a number or"),
        ({"workers": 0}, "workers must be"),
        ({"workers": 2, "vectorized": True}, "drop one"),
        ({"workers": 2, "parallel": "gpu"}, "parallel must be"),
        ({"workers": 2, "parallel": "processes"}, "cannot be sent"),
        ({"seed": 0.5}, "seed must be"),
        ({"scale": {"y": 2.0}}, "scale has the keys y, which x0 does not have"),
        ({"target": "low"}, "target must be"),
        ({"target": math.nan}, "target must be a number, got nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_f_is_called(settings, words):
    f = Counted(lambda x: bowl(x))
    with pytest.raises(UserError, match=words):
        zoft.minimize(f, np.ones(3), **settings)
    assert not f.asked
