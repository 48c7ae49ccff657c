"""The statements of docs/mathematics.md, measured; its links name these tests."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.estimates import estimates
from zoft.estimators.central import Central
from zoft.estimators.leave_one_out import LeaveOneOut
from zoft.estimators.one_point import OnePoint
from zoft.estimators.one_sided import OneSided
from zoft.estimators.three_point import ThreePoint
from zoft.subspaces.coordinate import Coordinate
from zoft.subspaces.full import Full


def plain(**fields):
    """One-point without feedback."""
    return OnePoint(feedback=False, **fields)


def mean_square(samples, gradient):
    """E ||estimate - gradient||^2."""
    return float(((samples - gradient) ** 2).sum(1).mean())


def quartic(xs):
    return (xs + xs**2 + xs**3 + xs**4).sum(-1)


# ----------------------------------------------------------------------------------------------------------- 1 Taylor


@pytest.mark.parametrize(("estimator", "order"), [(OneSided, 1), (Central, 2)])
def test_error_of_a_slope_falls_with_the_order_of_h(estimator, order):
    x, gradient = np.full(3, 0.2), 1 + 2 * 0.2 + 3 * 0.2**2 + 4 * 0.2**3
    errors = []
    for h in (1e-1, 1e-2):  # in subspace=coordinate a weight moves by sqrt(d) eps
        estimate = estimates(quartic, x, estimator(eps=h / math.sqrt(3), num_directions=3), "coordinate", count=1)[0]
        errors.append(np.abs(estimate - gradient).mean())
    assert 0.85 * order < math.log10(errors[0] / errors[1]) < 1.15 * order


def test_rounding_takes_over_when_h_is_small():
    x, gradient = np.full(2, 0.2), 1 + 2 * 0.2 + 3 * 0.2**2 + 4 * 0.2**3

    def error(estimator, h):
        whole = estimator(eps=h / math.sqrt(2), num_directions=2)
        return np.abs(estimates(quartic, x, whole, "coordinate", count=8) - gradient).max()

    assert error(OneSided, 1e-14) > 30 * error(OneSided, 1e-8) > 0
    assert error(Central, 1e-12) > 30 * error(Central, 1e-5) > 0
    assert error(Central, 1e-5) < error(OneSided, 1e-8)  # at their best radii


# ------------------------------------------------------------------------------------------------------ 2 unbiasedness


@pytest.mark.parametrize("law", ["gaussian", "rademacher", "sphere"])
def test_the_mean_is_the_gradient_where_f_is_quadratic(law):
    bends, x = np.array([1.0, 4.0, -2.0]), np.array([0.5, -0.3, 1.0])
    samples = estimates(lambda xs: (bends * xs**2).sum(1) / 2, x, Central(eps=0.3), Full(law=law), count=600)
    error = np.abs(samples.mean(0) - bends * x)
    assert (error < 4 * samples.std(0) / math.sqrt(len(samples))).all()


SMOOTHING = {
    "central": Central(eps=0.5, num_directions=4),
    "antithetic": OneSided(eps=0.5, num_directions=4, across="antithetic"),
    "orthogonal": Central(eps=0.5, num_directions=2, across="orthogonal"),
    "one_sided": OneSided(eps=0.5, num_directions=4),
    "three_point": ThreePoint(eps=0.5, num_directions=4),
    "leave_one_out": LeaveOneOut(eps=0.5, num_directions=4),
    "one_point": plain(eps=0.5, num_directions=4),
    "residual_feedback": OnePoint(eps=0.5, num_directions=4),
}


@pytest.mark.parametrize("name", [name for name in SMOOTHING if name != "orthogonal"])
def test_the_mean_is_the_gradient_of_the_smoothed_function(name):
    """Of |x|, which has no gradient at 0: smoothed by N(0, h^2) its slope is erf(x / (h sqrt 2))."""
    x = np.array([0.3, -0.2, 0.0])
    smoothed = np.array([math.erf(v / (0.5 * math.sqrt(2))) for v in x])
    samples = estimates(lambda xs: np.abs(xs).sum(1), x, SMOOTHING[name], count=500)
    error = np.abs(samples.mean(0) - smoothed)
    assert (error < 4.5 * samples.std(0) / math.sqrt(len(samples))).all()
    assert np.abs(smoothed[:2] - np.sign(x[:2])).min() > 0.3  # and not the gradient


def test_on_the_sphere_it_is_the_ball_that_smooths():
    """In two dimensions, of x_1^3: over the ball of radius r = h sqrt 2 the mean slope is 3 (x^2 + r^2 / 4)."""
    h, x = 0.5, np.array([0.4, 0.0])
    samples = estimates(lambda xs: xs[:, 0] ** 3, x, Central(eps=h), Full(law="sphere"), count=1500)
    smoothed = 3 * (0.4**2 + 2 * h**2 / 4)
    assert abs(samples[:, 0].mean() - smoothed) < 4 * samples[:, 0].std() / math.sqrt(len(samples))
    gaussian = 3 * (0.4**2 + h**2)  # what N(0, h^2) makes of it
    assert abs(samples[:, 0].mean() - gaussian) > 8 * samples[:, 0].std() / math.sqrt(len(samples))


# ---------------------------------------------------------------------------------------------------------- 3 variance


@pytest.mark.parametrize("d", [2, 32])
@pytest.mark.parametrize("law", ["gaussian", "rademacher", "sphere", "coordinate"])
def test_variance_grows_with_the_dimension(d, law):
    gradient = np.linspace(-1, 1, d) + 0.1
    subspace = Coordinate() if law == "coordinate" else Full(law=law)
    samples = estimates(lambda xs: xs @ gradient, np.zeros(d), Central(eps=0.1), subspace, count=500)
    expected = d + 1 if law == "gaussian" else d - 1
    measured = mean_square(samples, gradient) / float(gradient @ gradient)
    assert abs(measured / expected - 1) < 0.3


def test_variance_falls_with_directions_and_right_angles_end_it():
    d = 8
    gradient = np.linspace(-1, 1, d) + 0.1
    for q in (2, 8):
        for across, expected in (("iid", (d + 1) / q), ("orthogonal", d / q - 1)):
            estimator = Central(eps=0.1, num_directions=q, across=across)
            samples = estimates(lambda xs: xs @ gradient, np.zeros(d), estimator, count=160)
            measured = mean_square(samples, gradient) / float(gradient @ gradient)
            assert abs(measured - expected) < 0.3 * expected + 1e-9
    sweep = estimates(lambda xs: xs @ gradient, np.zeros(d), OneSided(num_directions=d), "coordinate", count=2)
    np.testing.assert_allclose(sweep, [gradient] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(Central, lambda d, s, h, q: d * s**2 / (2 * h**2 * q)), (OneSided, lambda d, s, h, q: 2 * d * s**2 / (h**2 * q))],
)
def test_noise_is_divided_by_h(estimator, expected):
    d, sigma, q = 8, 0.01, 2
    noise = np.random.default_rng(0)
    for h in (1e-1, 1e-3):
        samples = estimates(
            lambda xs: noise.normal(0, sigma, len(xs)), np.zeros(d), estimator(eps=h, num_directions=q), count=500
        )
        assert abs(mean_square(samples, 0.0) / expected(d, sigma, h, q) - 1) < 0.25


# --------------------------------------------------------------------------------------------------------- 4 one point


def test_one_point_explodes_and_residual_feedback_does_not():
    d, gradient = 8, np.ones(8)

    def measured(estimator, level):
        samples = estimates(lambda xs: level + xs @ gradient, np.zeros(d), estimator, count=500)
        return mean_square(samples[1:], gradient)

    for h in (1e-1, 1e-3):
        assert abs(measured(plain(eps=h), 1.0) / (d / h**2) - 1) < 0.35  # d f(x)^2 / h^2
        at_rest = (2 * d + 1) * d  # (2 d + 1) ||g||^2, whatever h and the level are
        assert abs(measured(OnePoint(eps=h), 1.0) / at_rest - 1) < 0.35
        assert abs(measured(OnePoint(eps=h), 100.0) / at_rest - 1) < 0.35


def test_residual_feedback_pays_for_how_far_x_has_gone():
    """Between steps f changes by a: the variance has d a^2 / h^2 in it again."""
    d, h, change, step = 8, 1e-2, 0.5, iter(range(10**6))
    samples = estimates(lambda xs: np.full(len(xs), change * next(step)), np.zeros(d), OnePoint(eps=h), count=500)
    assert abs(mean_square(samples[1:], 0.0) / (d * change**2 / h**2) - 1) < 0.25


@pytest.mark.parametrize("q", [2, 8])
def test_leave_one_out_comes_near_to_a_clean_query(q):
    d, gradient = 8, np.ones(8)
    with_clean, without = (
        mean_square(
            estimates(lambda xs: 5 + xs @ gradient, np.zeros(d), kind(eps=0.1, num_directions=q), count=300), gradient
        )
        for kind in (OneSided, LeaveOneOut)
    )
    assert abs(without / with_clean - (q / (q - 1))) < 0.3


# ------------------------------------------------------------------------------------------------ 5 best h under noise


@pytest.mark.parametrize("sigma", [1e-4, 1e-8])
def test_the_best_radius_under_noise(sigma):
    """Of x^3 / 6 + x^2 / 2, whose second and third derivative at 0 are K = M = 1."""
    noise = np.random.default_rng(1)
    best = {Central: (3 * sigma) ** (1 / 3), OneSided: (8 * sigma**2) ** 0.25}
    for estimator, predicted in best.items():
        error = {}
        for factor in (0.2, 1.0, 5.0):
            h = predicted * factor
            f = lambda xs: (xs**2 / 2 + xs**3 / 6).sum(1) + noise.normal(0, sigma, len(xs))  # noqa: E731
            error[factor] = mean_square(estimates(f, np.zeros(1), estimator(eps=h), "coordinate", count=150), 0.0)
        assert error[1.0] < 0.5 * min(error[0.2], error[5.0])
        bias, spread = (
            (predicted**2 / 6, sigma**2 / (2 * predicted**2))
            if estimator is Central
            else (predicted / 2, 2 * sigma**2 / predicted**2)
        )
        assert abs(error[1.0] / (bias**2 + spread) - 1) < 0.4


def test_the_smoothed_gradient_is_off_by_h_squared_of_the_laplacian():
    """grad f_h = grad f + h^2 / 2 grad (Laplacian f) + O(h^4), exactly of a cubic."""
    d, h = 3, 0.4
    samples = estimates(lambda xs: (xs**3).sum(1) / 6, np.zeros(d), Central(eps=h, num_directions=4), count=400)
    error = samples.mean(0) - h**2 / 2
    assert (np.abs(error) < 4 * samples.std(0) / math.sqrt(len(samples))).all()
