"""Diagnostics in closed form: gradient, cosine, Gram matrix, variance and eps on functions whose own are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zoft.component import create
from zoft.diagnostics.alignment import alignment
from zoft.diagnostics.asking import Asking
from zoft.diagnostics.bystander import Bystander, mirrored
from zoft.diagnostics.gradient import gradient_of
from zoft.diagnostics.probes import gram_summary, signal, true_slopes
from zoft.diagnostics.radius import exact_slopes, radius_table
from zoft.diagnostics.variance import Law, variance_table
from zoft.engines.layerwise import Layerwise
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.weights.tensors import Weights

D = 48


class Curve(nn.Module):
    """f(w) = 1/2 sum a_i w_i^2 + scale sum w_i, whose gradient is a w + scale."""

    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, D))
        self.register_buffer("a", torch.linspace(0.5, 2, D))
        self.power = power

    def forward(self, scale: float) -> torch.Tensor:
        return (self.a * self.w**self.power).sum() / self.power + scale * self.w.sum()


def asking(model: Curve, num_probes: int, law: str = "gaussian", **fields: Any) -> tuple[Asking, list[Direction]]:
    """The method ``central, mean`` on the curve, and directions of its step 0."""
    method = Method.of(
        create("subspace", "full", "full").__class__(law=law), create("estimator", "central", "").__class__(**fields)
    )
    coordinates = method.bind(Weights(model))
    zo_optimizer = ZOOptimizer(
        [{"params": [model.w]}], method.optimizer, Layerwise().bind(model, coordinates, model), 1.0
    )
    directions = [Direction(1, 0, probe) for probe in range(num_probes)]
    session = Bystander(model, mirrored(coordinates, num_probes), model)
    return Asking(
        StepQueries(method, zo_optimizer), session, 0.3, method.estimator, {"estimator": {}, "weighting": {}}
    ), directions


# -------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("law", "across", "one"), [("gaussian", "iid", D + 2), ("rademacher", "iid", D), ("gaussian", "orthogonal", None)]
)
def test_mean_square_and_cosine_follow_the_theory(law: str, across: str, one: int | None):
    """E|ghat|^2 = (A + q - 1) / q |g|^2, E cos^2 = 1 / d for one direction and q / d at right angles."""
    model, q = Curve(), 1 if across == "iid" else 4
    count = 480 if across == "iid" else D
    ask, directions = asking(model, count, law, num_directions=q, across=across, eps=0.1)
    gradient = {"w": model.a * model.w.detach() + 0.3}
    norm = float(gradient["w"].norm())
    coordinates = ask.session.coordinates
    kind = "orthogonal" if one is None else {"gaussian": "gaussian"}.get(law, "length")
    sizes = [1, 2, 8] if one else [4, 16, 48]
    rows = variance_table(
        directions,
        ask,
        coordinates.gram,
        sizes,
        lambda some: true_slopes(coordinates, gradient, some),
        norm,
        Law(kind, D, float(D), norm**2),
    )
    for row in rows:
        size = row["num_directions"]
        expected = norm**2 * (D / size if one is None else (one + size - 1) / size)
        assert row["theory"] == pytest.approx(expected)
        spread = row["standard_error"] if row["standard_error"] is not None else 0.0
        assert abs(row["mean_square"] - expected) < 4 * spread + 1e-3 * expected
        if one is None:
            assert row["variance"] == pytest.approx(expected - norm**2, abs=4 * spread + 2e-3 * expected)
    if one is None:  # all directions at right angles: the estimate is the gradient
        assert rows[-1]["cosine_square"] == pytest.approx(1.0, abs=1e-4)
        assert abs(rows[-1]["variance"]) < 1e-3 * norm**2
    else:
        assert rows[0]["cosine_square"] == pytest.approx(1 / D, rel=0.25)


def test_probes_and_gram():
    ask, directions = asking(Curve(), 8, num_directions=4, across="orthogonal", eps=0.1)
    gram = ask.session.coordinates.gram(directions)
    assert torch.allclose(gram, torch.eye(8, dtype=torch.float64) * D, atol=1e-3)
    assert gram_summary(gram)["gram_effective_rank"] == pytest.approx(8)
    assert gram_summary(gram)["gram_offdiagonal"] < 1e-5
    again = ask.queries.optimizer.subspace.gram(directions[:4])  # the run's own four are the first of the eight
    assert torch.allclose(again, gram[:4, :4], atol=1e-4)
    assert gram_summary(torch.ones(5, 5))["gram_effective_rank"] == pytest.approx(1)
    assert gram_summary(torch.ones(1, 1))["gram_offdiagonal"] is None
    figures = signal(torch.tensor([1.0, 2.0, 3.0]))
    assert (figures["probe_mean"], figures["probe_std"], figures["snr"]) == (2.0, 1.0, 2.0)
    assert signal(torch.tensor([1.0]))["snr"] is None


def test_slopes_of_probes_are_exact_on_a_quadratic_and_nothing_is_asked_twice():
    model = Curve()
    ask, directions = asking(model, 6, eps=0.1)
    gradient = {"w": model.a * model.w.detach() + 0.3}
    slopes = ask.all_slopes(directions)
    exact = true_slopes(ask.session.coordinates, gradient, directions)
    assert torch.allclose(slopes.double(), exact, rtol=1e-3, atol=1e-3)
    assert ask.session.num_queries == 12
    ask(directions)
    assert ask.session.num_queries == 12
    jvp = exact_slopes(ask.session, 0.3, directions)
    assert jvp is not None
    assert torch.allclose(jvp.double(), exact, rtol=1e-5)
    assert ask.session.num_queries == 24


def test_error_of_a_finite_difference_is_rounding_on_a_quadratic_and_u_shaped_beyond():
    radii = [1e-7, 1e-3, 1.0]
    errors = {}
    for power in (2, 4):
        ask, directions = asking(Curve(power), 2)
        exact = exact_slopes(ask.session, 0.3, directions)
        assert exact is not None
        table = radius_table(ask.session, 0.3, directions, ask.estimator, exact, radii)
        errors[power] = [row["error"] for row in table]
    assert errors[2][2] < 1e-5
    assert errors[2][0] > errors[2][1] > errors[2][2]  # rounding alone: the larger the better
    assert errors[4][0] > 10 * errors[4][1] < errors[4][2]


def test_gradient_is_the_sum_of_weighted_parts_and_leaves_what_was_there():
    model = Curve()
    model.w.grad = before = torch.ones(D)
    coordinates = Method.of().bind(Weights(model))
    session = Bystander(model, coordinates, model)
    gradient = gradient_of(session, [(0.0, 0.25), (4.0, 0.75)])
    assert torch.allclose(gradient["w"], model.a * model.w.detach() + 3.0)
    assert model.w.grad is before
    assert session.num_queries == 0, "losses are counted, and who asks for a gradient counts it"
    same = alignment(coordinates, [], dense=gradient, gradient=gradient)
    assert same.cosine == pytest.approx(1)
    assert same.norm_ratio == pytest.approx(1)
