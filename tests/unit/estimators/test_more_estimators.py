"""The other estimators against values worked out by hand, the gradient, and what they are said to pay."""

from __future__ import annotations

import math

import pytest
import torch

from zoft.errors import UserError
from zoft.estimators import Point
from zoft.estimators.addax import Addax
from zoft.estimators.backprop import Backprop
from zoft.estimators.central import Central
from zoft.estimators.hybrid import Hybrid
from zoft.estimators.kernel import Kernel, kernel, radius
from zoft.estimators.leave_one_out import LeaveOneOut
from zoft.estimators.one_point import OnePoint
from zoft.estimators.one_sided import OneSided
from zoft.estimators.per_example import PerExample
from zoft.estimators.svrg import SVRG
from zoft.estimators.three_point import ThreePoint
from zoft.noise.direction import Direction
from zoft.step.method import Method

A, B, C = Direction(0, 3, 0), Direction(0, 3, 1), Direction(0, 3, 2)


# ---------------------------------------------------------------------------------------------------------- by hand


def test_leave_one_out_by_hand():
    estimator = LeaveOneOut(eps=0.5, num_directions=3)
    assert estimator.points([A, B, C]) == [Point(A, 0.5), Point(B, 0.5), Point(C, 0.5)]
    losses = torch.tensor([3.0, 1.0, 2.0])
    wanted = [(3.0 - 1.5) / 0.5, (1.0 - 2.5) / 0.5, (2.0 - 2.0) / 0.5]  # each against the mean of the other two
    assert estimator.projected_grads(losses).tolist() == pytest.approx(wanted)
    assert estimator.probe_losses(losses).tolist() == [[3.0], [1.0], [2.0]]
    assert (float(estimator.loss(losses)), estimator.num_queries, estimator.asks_clean_loss) == (2.0, 3, False)


def test_leave_one_out_in_pairs_is_the_central_difference():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(6, generator=generator)
    pairs = LeaveOneOut(eps=0.25, num_directions=6, across="antithetic").projected_grads(losses) / 6
    central = Central(eps=0.25, num_directions=3).projected_grads(losses) / 3
    torch.testing.assert_close(pairs[0::2] - pairs[1::2], central)  # a z + b (-z)


def test_leave_one_out_needs_two():
    with pytest.raises(UserError, match=r"leave_one_out.num_directions must be at least 2, got 1"):
        LeaveOneOut(num_directions=1)


def test_one_point_by_hand():
    estimator = OnePoint(eps=0.5, num_directions=2)
    assert estimator.points([A, B]) == [Point(A, 0.5), Point(B, 0.5)]
    state = estimator.init()
    assert estimator.measure(torch.tensor([3.0, 1.0]), state).projected_grads.tolist() == [0.0, 0.0]
    measured = estimator.measure(torch.tensor([2.0, 4.0]), state)
    assert measured.projected_grads.tolist() == [-2.0, 6.0]
    assert (measured.losses.tolist(), float(measured.loss)) == ([[2.0], [4.0]], 3.0)
    assert state == {"losses": [2.0, 4.0]}
    assert estimator.num_queries == 2


def test_three_point_by_hand():
    estimator = ThreePoint(eps=0.5, num_directions=2)
    assert estimator.points([A, B]) == [Point(), Point(A, 0.5), Point(A, -0.5), Point(B, 0.5), Point(B, -0.5)]
    losses = torch.tensor([2.0, 3.0, 1.0, 2.0, 5.0])
    measured = estimator.measure(losses)
    assert measured.projected_grads.tolist() == [2.0, -3.0]
    assert measured.curvatures.tolist() == [0.0, 12.0]
    assert measured.losses.tolist() == [[3.0, 1.0], [2.0, 5.0]]
    assert (float(measured.loss), estimator.num_queries, estimator.asks_clean_loss) == (2.0, 5, True)


def test_per_example_by_hand():
    estimator = PerExample(eps=0.5, num_directions=2)
    assert estimator.points([A, B]) == [Point(A, 0.5), Point(A, -0.5), Point(B, 0.5), Point(B, -0.5)]
    losses = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 0.0], [5.0, 0.0]])  # [2 Q, B]
    measured = estimator.measure(losses)
    assert measured.projected_grads.tolist() == [2.0, -1.0, -3.0, 0.0]  # of A: both examples, then of B
    assert measured.losses.tolist() == [[3.0, 1.0], [1.0, 2.0], [2.0, 5.0], [0.0, 0.0]]
    assert float(measured.loss) == 1.75
    assert estimator.num_queries == 4


def test_svrg_by_hand():
    estimator = SVRG(eps=0.5, num_directions=1, interval=3, anchor_batches=4)
    state = estimator.init()
    assert [estimator.queries_at(step) for step in range(5)] == [8, 4, 4, 8, 4]
    first = Direction(7, 0)
    assert estimator.points([first]) == [Point(first, 0.5), Point(first, -0.5)]
    assert estimator.measure(torch.tensor([3.0, 1.0]), state).projected_grads.tolist() == [2.0]
    assert estimator.terms([(first, 2.0)], state) == [(first, 2.0)]
    second = Direction(7, 1)
    points = [Point(second, s, anchor=anchor) for anchor in (False, True) for s in (0.5, -0.5)]
    assert estimator.points([second]) == points
    measured = estimator.measure(torch.tensor([2.0, 1.0, 5.0, 2.0]), state)
    assert measured.projected_grads.tolist() == [1.0 - 3.0]
    assert (float(measured.loss), measured.losses.tolist()) == (1.5, [[2.0, 1.0]])
    assert estimator.terms([(second, -2.0)], state) == [(second, -2.0), (first, 2.0)]


def test_svrg_without_an_anchor_is_central():
    estimator = SVRG(eps=0.5)
    measured = estimator.measure(torch.tensor([2.0, 1.0, 2.0, 1.0]), estimator.init())
    assert measured.projected_grads.tolist() == [1.0]
    step = Direction(7, 1)
    assert estimator.terms([(step, 1.0)], estimator.init()) == [(step, 1.0)]


def test_kernel_by_hand():
    estimator = Kernel(eps=0.5, num_directions=1)
    r = radius(A)
    assert estimator.points([A]) == [Point(A, r * 0.5), Point(A, -r * 0.5)]
    assert estimator.projected_grads(torch.tensor([3.0, 1.0])).tolist() == [2.0]
    assert estimator.terms([(A, 2.0)], {}) == [(A, 2.0 * kernel(r))]


def test_the_kernel_has_the_moments_it_is_made_for():
    """Integrals over [-1, 1] with density 1/2, exact by Gauss-Legendre; the last is the price."""
    small, large = math.sqrt(5 - 2 * math.sqrt(10 / 7)) / 3, math.sqrt(5 + 2 * math.sqrt(10 / 7)) / 3
    w_small, w_large = (322 + 13 * math.sqrt(70)) / 900, (322 - 13 * math.sqrt(70)) / 900
    nodes = [(0.0, 128 / 225), (small, w_small), (-small, w_small), (large, w_large), (-large, w_large)]
    mean = lambda f: sum(w * f(x) for x, w in nodes) / 2  # noqa: E731
    assert mean(kernel) == pytest.approx(0, abs=1e-12)
    assert mean(lambda r: r * kernel(r)) == pytest.approx(1)
    assert mean(lambda r: r**3 * kernel(r)) == pytest.approx(0, abs=1e-12)
    assert mean(lambda r: (r * kernel(r)) ** 2) == pytest.approx(6.25)


def test_radii_are_uniform_and_belong_to_the_direction():
    r = torch.tensor([radius(Direction(1, step, probe)) for step in range(100) for probe in range(100)])
    assert float(r.abs().max()) < 1
    for power, wanted in ((1, 0.0), (2, 1 / 3), (4, 1 / 5)):
        values = r**power
        assert abs(float(values.mean()) - wanted) < 3 * float(values.std()) / 100
    assert radius(Direction(1, 2, 3)) == radius(Direction(1, 2, 3, example=4))


# ----------------------------------------------------------------------------------------- on functions that are known

DIM, MANY = 6, 20_000


def directions(count: int = MANY) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def bowl() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    at, linear = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    return root @ root.T / DIM, linear, at


def bowl_at(points: list[Point], z: torch.Tensor) -> torch.Tensor:
    """f(x) = x^T H x / 2 + b^T x at every point."""
    hessian, linear, at = bowl()
    moved = torch.stack([at if p.direction is None else at + p.scale * z[p.direction.index] for p in points])
    return 0.5 * torch.einsum("pi,ij,pj->p", moved, hessian, moved) + moved @ linear


def gradient() -> torch.Tensor:
    hessian, linear, at = bowl()
    return hessian @ at + linear


def is_right_on_average(estimates: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = estimates.std(0) / len(estimates) ** 0.5
    return bool(((estimates.mean(0) - wanted).abs() < 3.5 * error).all())


@pytest.mark.parametrize("q", [2, 5])
@pytest.mark.parametrize("across", ["iid", "antithetic"])
def test_leave_one_out_is_unbiased_for_every_q(q, across):
    if across == "antithetic":
        q = 2 * q
    estimator, z = LeaveOneOut(eps=0.1, num_directions=q, across=across), directions(MANY // q * q)
    if across == "antithetic":
        z[1::2] = -z[0::2]
    losses = bowl_at([Point(Direction(0, 0, i), 0.1) for i in range(len(z))], z)
    slopes = torch.cat([estimator.projected_grads(group) for group in losses.split(q)])
    estimates = (slopes.unsqueeze(1) * z).view(-1, q, DIM).mean(1)
    assert is_right_on_average(estimates, gradient())


def test_leave_one_out_pays_its_share_of_variance():
    """Against one_sided at the same directions: about one part in q - 1 more."""
    q, z = 8, directions(16_000)
    at = bowl_at([Point()], z)
    losses = bowl_at([Point(Direction(0, 0, i), 1e-3) for i in range(len(z))], z)
    variances = []
    for estimator, clean in (
        (OneSided(eps=1e-3, num_directions=q), True),
        (LeaveOneOut(eps=1e-3, num_directions=q), 0),
    ):
        slopes = [estimator.projected_grads(torch.cat((at, g)) if clean else g) for g in losses.split(q)]
        estimates = (torch.cat(slopes).unsqueeze(1) * z).view(-1, q, DIM).mean(1)
        variances.append(float(estimates.var(0).sum()))
    assert 1.0 < variances[1] / variances[0] < 1 + 2 / (q - 1)


@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_one_point_is_unbiased_and_its_variance_explodes_as_eps_vanishes(moved):
    """The rest of the difference, how far the loss has gone since, is divided by eps."""
    z, variances = directions(), {}
    for eps in (0.3, 0.03):
        estimator, state = OnePoint(eps=eps, num_directions=MANY), {"losses": []}
        losses = bowl_at(estimator.points(estimator.directions(0, 0)), z)
        state["losses"] = (losses.roll(1) + moved).tolist()
        estimates = estimator.measure(losses, state).projected_grads.double().unsqueeze(1) * z
        assert is_right_on_average(estimates, gradient())
        variances[eps] = float(estimates.var(0).sum())
    assert (variances[0.03] / variances[0.3] > 10) == (moved > 0)


def test_three_point_finds_the_curvature():
    z, estimator = directions(50), ThreePoint(eps=0.1, num_directions=50)
    measured = estimator.measure(bowl_at(estimator.points(estimator.directions(0, 0)), z))
    hessian = bowl()[0]
    torch.testing.assert_close(measured.curvatures, torch.einsum("qi,ij,qj->q", z, hessian, z))
    torch.testing.assert_close(measured.projected_grads, z @ gradient())


def cubic(points: list[Point], z: torch.Tensor) -> torch.Tensor:
    """f(x) = sum(x^3) / 6 + b^T x at 0: along z the slope is b^T z, and D^3 f[z, z, z] = sum(z^3)."""
    moved = torch.stack([p.scale * z[p.direction.index] for p in points])
    return (moved**3).sum(1) / 6 + moved.sum(1)


def test_the_kernel_takes_away_the_bias_that_central_has():
    """E[central] = grad + eps^2 E[sum(z^3) z] / 6 = 1 + eps^2 / 2 in each element; at eps = 1 that is seen."""
    z, eps = directions(), 1.0
    estimates = {}
    for cls in (Central, Kernel):
        estimator = cls(eps=eps, num_directions=MANY)
        named = estimator.directions(0, 0)
        slopes = estimator.projected_grads(cubic(estimator.points(named), z))
        coefficients = [c for _, c in estimator.terms(list(zip(named, slopes.tolist(), strict=True)), {})]
        estimates[cls] = torch.tensor(coefficients, dtype=torch.float64).unsqueeze(1) * z
    assert is_right_on_average(estimates[Kernel], torch.ones(DIM, dtype=torch.float64))
    assert is_right_on_average(estimates[Central], torch.full((DIM,), 1.5, dtype=torch.float64))
    assert float((estimates[Central].mean(0) - 1).min()) > 0.3


def test_the_kernel_pays_six_fold_variance():
    z, variances = directions(), []
    for cls in (Central, Kernel):
        estimator = cls(eps=1e-2, num_directions=MANY)
        named = estimator.directions(0, 0)
        slopes = estimator.projected_grads(bowl_at(estimator.points(named), z))
        terms = estimator.terms(list(zip(named, slopes.tolist(), strict=True)), {})
        estimates = torch.tensor([c for _, c in terms], dtype=torch.float64).unsqueeze(1) * z
        assert is_right_on_average(estimates, gradient())
        variances.append(float(estimates.square().sum()))
    assert variances[1] / variances[0] == pytest.approx(6.25, rel=0.1)


# ------------------------------------------------------------------------------------------------ what is refused


def test_svrg_refuses_what_would_change_earlier_directions():
    for subspace in ("low_rank", "blocks"):
        with pytest.raises(UserError, match=f"estimator=svrg takes up .* subspace={subspace} .*use subspace=full"):
            Method.of(subspace, "svrg")
    with pytest.raises(UserError, match=r"weighting=loss_std.*use weighting=mean"):
        Method.of("full", "svrg", "loss_std")
    with pytest.raises(UserError, match=r"optimizer=cone.*use optimizer=sgd"):
        Method.of("full", "svrg", "mean", "cone")
    with pytest.raises(UserError, match=r"svrg.across=orthogonal"):
        SVRG(num_directions=2, across="orthogonal")


@pytest.mark.parametrize("estimator", ["backprop", "addax", "hybrid"])
def test_a_backward_pass_refuses_what_knows_directions_only(estimator):
    with pytest.raises(UserError, match=f"estimator={estimator} takes gradients.*subspace=low_rank.*use subspace=full"):
        Method.of("low_rank", estimator)
    for optimizer in ("conservative", "cone", "replay_adam", "scalar_adam"):
        with pytest.raises(UserError, match=f"estimator={estimator} takes gradients.*optimizer={optimizer} "):
            Method.of("full", estimator, "mean", optimizer)
    for optimizer in ("sgd", "momentum", "adam", "adamw"):
        Method.of("full", estimator, "mean", optimizer)


def test_backprop_has_no_directions():
    estimator = Backprop()
    assert (estimator.points(estimator.directions(0, 0)), estimator.num_queries) == ([], 3)
    with pytest.raises(UserError, match=r"backprop.num_directions must be 1 .*got 4"):
        Backprop(num_directions=4)
    with pytest.raises(UserError, match=r"weighting=sign.*use weighting=mean"):
        Method.of("full", "backprop", "sign")


def test_addax_divides_by_length():
    estimator = Addax(long_tokens=100, zo_share=0.25)
    assert (estimator.queried_lengths, estimator.backpropagated_lengths) == ((101, math.inf), (0, 100))
    assert (estimator.share_of_backward(True), estimator.share_of_backward(False)) == (0.75, 1.0)
    assert estimator.num_queries == 5


OPT = ["m.embed_tokens.weight", "m.final_layer_norm.weight", "m.layers.0.fc", "m.layers.1.fc", "m.layers.2.fc"]


@pytest.mark.parametrize(
    ("names", "blocks", "above"),
    [
        (OPT, 1, {"m.layers.2.fc", "m.final_layer_norm.weight"}),
        (OPT, 2, {"m.layers.1.fc", "m.layers.2.fc", "m.final_layer_norm.weight"}),
        (["embed_in", "layers.0.a", "layers.1.a", "norm", "embed_out"], 1, {"layers.1.a", "norm", "embed_out"}),
        (["layers.0.lora_A", "layers.0.lora_B", "layers.1.lora_A"], 1, {"layers.1.lora_A"}),
        (
            ["shared", "enc.block.0", "enc.final_layer_norm", "dec.block.0", "dec.block.1", "dec.final_layer_norm"],
            1,
            {"dec.block.1", "dec.final_layer_norm"},
        ),
    ],
)
def test_hybrid_takes_the_last_layers_and_what_is_behind_them(names, blocks, above):
    assert Hybrid(backprop_blocks=blocks).backprop_names(names) == above


def test_hybrid_refuses_a_model_without_layers_above_or_below():
    with pytest.raises(UserError, match="no trained tensor has a layer's number"):
        Hybrid().backprop_names(["a.weight", "b.weight"])
    with pytest.raises(UserError, match=r"hybrid.backprop_blocks=3 leaves nothing below .* use estimator=backprop"):
        Hybrid(backprop_blocks=3).backprop_names(["layers.0.a", "layers.1.a", "norm"])
