"""Points and coefficients against values worked out by hand, and the mean estimate against the gradient."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from zoft.errors import UserError
from zoft.estimators import Point
from zoft.estimators.central import Central, projected_grad
from zoft.estimators.forward_gradient import ForwardGradient
from zoft.estimators.one_sided import OneSided
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS, CounterNoise

A, B, C = Direction(0, 3, 0), Direction(0, 3, 1), Direction(0, 3, 2)


def test_directions_are_named_by_seed_step_and_probe():
    assert Central(num_directions=3).directions(0, 3) == [A, B, C]


def test_central_by_hand():
    estimator = Central(eps=0.5, num_directions=2)
    assert estimator.points([A, B]) == [Point(A, 0.5), Point(A, -0.5), Point(B, 0.5), Point(B, -0.5)]
    losses = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert estimator.projected_grads(losses).tolist() == [2.0, -3.0]
    assert (estimator.projected_grads(losses) / estimator.num_directions).tolist() == [1.0, -1.5]
    assert float(estimator.loss(losses)) == 2.75
    assert (estimator.num_queries, estimator.radius) == (4, 0.5)


def test_one_sided_by_hand():
    estimator = OneSided(eps=0.25, num_directions=3)
    assert estimator.points([A, B, C]) == [Point(), Point(A, 0.25), Point(B, 0.25), Point(C, 0.25)]
    losses = torch.tensor([2.0, 3.0, 1.0, 2.0])
    assert estimator.projected_grads(losses).tolist() == [4.0, -4.0, 0.0]
    assert (estimator.projected_grads(losses) / estimator.num_directions).tolist() == pytest.approx(
        [4 / 3, -4 / 3, 0.0]
    )
    assert float(estimator.loss(losses)) == 2.0
    assert (estimator.num_queries, estimator.radius) == (4, 0.25)


def test_forward_gradient_by_hand():
    estimator = ForwardGradient(num_directions=2)
    assert estimator.points([A, B]) == [Point(), Point(A, derivative=True), Point(B, derivative=True)]
    losses = torch.tensor([7.0, 1.0, -3.0])
    assert estimator.projected_grads(losses).tolist() == [1.0, -3.0]
    assert (estimator.projected_grads(losses) / estimator.num_directions).tolist() == [0.5, -1.5]
    assert float(estimator.loss(losses)) == 7.0
    assert (estimator.num_queries, estimator.radius) == (4, 0.0)


def test_non_finite_losses_are_left_for_the_guard():
    grads = projected_grad(torch.tensor([float("nan"), float("inf"), 1.0]), torch.zeros(3), 0.5)
    assert grads.isnan().tolist() == [True, False, False]
    assert grads.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("cls", [Central, OneSided, ForwardGradient])
def test_bad_values_name_their_field(cls):
    with pytest.raises(UserError, match=rf"{cls.name()}.num_directions must be at least 1, got 0"):
        cls(num_directions=0)
    with pytest.raises(UserError, match=rf"{cls.name()}.noise must be one of"):
        cls(noise="white")
    if cls is not ForwardGradient:
        for eps in (0.0, -1e-3, float("nan")):
            with pytest.raises(UserError, match=rf"{cls.name()}.eps must be > 0"):
                cls(eps=eps)


# ------------------------------------------------------------------------------------------------- on a quadratic bowl

DIM, MANY = 6, 10_000


@lru_cache
def many_directions(law: str) -> torch.Tensor:
    source = CounterNoise(law, {"x": DIM})
    cpu = torch.device("cpu")
    return torch.stack([source.draw(Direction(2, 0, i), "x", 0, DIM, cpu, torch.float32) for i in range(MANY)]).double()


def quadratic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    x = torch.randn(DIM, generator=generator, dtype=torch.float64)
    linear = torch.randn(DIM, generator=generator, dtype=torch.float64)
    return root @ root.T / DIM, linear, x


def losses_at(points: list[Point], z: torch.Tensor) -> torch.Tensor:
    """f or its exact directional derivative at every point: f(x) = x^T H x / 2 + b^T x."""
    hessian, linear, x = quadratic()
    moved = torch.stack(
        [x if p.direction is None or p.derivative else x + p.scale * z[p.direction.index] for p in points]
    )
    values = 0.5 * torch.einsum("pi,ij,pj->p", moved, hessian, moved) + moved @ linear
    slopes = z @ (hessian @ x + linear)
    return torch.stack([slopes[p.direction.index] if p.derivative else values[i] for i, p in enumerate(points)])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("cls", [Central, OneSided, ForwardGradient])
def test_the_mean_estimate_is_the_gradient(cls, law):
    estimator = cls(num_directions=MANY)
    z = many_directions(law)
    losses = losses_at(estimator.points(estimator.directions(2, 0)), z)
    hessian, linear, x = quadratic()
    gradient = hessian @ x + linear
    estimates = (
        (estimator.projected_grads(losses) / estimator.num_directions).unsqueeze(1) * z * MANY
    )  # [Q, DIM], one estimate a direction
    standard_error = estimates.std(0) / MANY**0.5
    assert bool(((estimates.mean(0) - gradient).abs() < 3 * standard_error).all())
    assert float(estimates.mean(0) @ gradient / gradient.norm() ** 2) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("law", LAWS)
def test_central_is_exact_on_a_quadratic_and_one_sided_is_off_by_half_eps_curvature(law):
    hessian, linear, x = quadratic()
    z = many_directions(law)[:50]
    slopes = z @ (hessian @ x + linear)
    curvature = torch.einsum("qi,ij,qj->q", z, hessian, z)
    for cls, bias in ((Central, 0.0), (OneSided, 0.5)):
        estimator = cls(eps=0.1, num_directions=50)
        grads = estimator.projected_grads(losses_at(estimator.points(estimator.directions(2, 0)), z))
        torch.testing.assert_close(grads, slopes + bias * 0.1 * curvature, rtol=1e-9, atol=1e-9)
