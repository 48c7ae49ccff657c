"""Weightings against values worked out by hand, least squares, and Bayes' rule."""

from __future__ import annotations

import pytest
import torch

from zoft.component import components
from zoft.errors import UserError
from zoft.estimators.base import Measured
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.estimators.per_example import PerExample
from zoft.step.method import Method
from zoft.weightings.align import Align
from zoft.weightings.clip import Clip
from zoft.weightings.curvature import Curvature
from zoft.weightings.kalman import Kalman
from zoft.weightings.loss_std import LossStd
from zoft.weightings.mean import Mean
from zoft.weightings.per_prompt import PerPrompt
from zoft.weightings.ranks import Ranks
from zoft.weightings.sign import Sign
from zoft.weightings.z_score import ZScore


def no_gram():
    raise AssertionError("the inner products cost a pass over all directions")


def exact(slopes: list[float]) -> Measured:
    return Measured(torch.tensor(slopes), torch.tensor(0.0), torch.empty(len(slopes), 0))


def weigh(weighting, measured: Measured, gram=no_gram) -> list[float]:
    coefficients = weighting.coefficients(measured, gram, weighting.init())
    assert coefficients.dtype == torch.float32
    assert coefficients.shape == measured.projected_grads.shape
    return coefficients.tolist()


# ------------------------------------------------------------------------------------------------------ by the losses


def test_loss_std_is_fzoos_step():
    """c_i = (l_i - l_0) / (N std), population standard deviation."""
    losses = torch.tensor([2.0, 2.5, 1.0, 2.0, 2.5])
    measured = OneSided(eps=0.01, num_directions=4).measure(losses)
    wanted = (losses[1:] - losses[0]) / (4 * losses[1:].std(correction=0))
    assert weigh(LossStd(), measured) == pytest.approx(wanted.tolist(), rel=1e-6)


def test_loss_std_of_pairs_sets_each_against_its_own_mean():
    losses = torch.tensor([13.0, 11.0, 1.0, 2.0])
    measured = Central(eps=0.5, num_directions=2).measure(losses)
    rms = ((2.0**2 + 1.0**2) / 2) ** 0.5
    assert weigh(LossStd(), measured) == pytest.approx([2 / (2 * rms), -1 / (2 * rms)])
    assert weigh(LossStd(), exact(measured.projected_grads.tolist())) == pytest.approx(weigh(LossStd(), measured))


@pytest.mark.parametrize("eps", [1e-4, 1e-1])
def test_loss_std_and_z_score_do_not_depend_on_eps(eps):
    """On a plane the losses are L0 +- eps p: one side and two sides, the same step at every radius."""
    slopes = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    one = OneSided(eps=eps, num_directions=3).measure(torch.cat((torch.zeros(1), eps * slopes)).double())
    two = Central(eps=eps, num_directions=3).measure(torch.stack((eps * slopes, -eps * slopes), 1).view(-1))
    for measured, spread in ((one, slopes.std(correction=0)), (two, slopes.square().mean().sqrt())):
        coefficients = LossStd(floor=0.0).coefficients(measured, no_gram, {})
        torch.testing.assert_close(coefficients, slopes / (3 * spread))
        centre = slopes.mean() if measured is one else 0.0
        coefficients = ZScore(floor=0.0).coefficients(measured, no_gram, {})
        torch.testing.assert_close(coefficients, (slopes - centre) / (3 * spread))


def test_loss_std_of_one_pair_is_the_slopes_sign():
    for slope in (3.0, -1e-2):
        measured = Central(eps=1e-2).measure(torch.tensor([slope * 1e-2, -slope * 1e-2]))
        assert weigh(LossStd(), measured) == pytest.approx([1.0 if slope > 0 else -1.0])


def test_loss_std_of_examples_is_grzos_step():
    """a_i = delta_i / std(delta), g = 1 / (2 eps B) sum a_i z_i: ours times 1 / (2 eps), where delta is centred."""
    eps, delta = 0.01, torch.tensor([0.3, -0.1, 0.2, -0.4])
    level = torch.tensor([1.0, 5.0, 9.0, 2.0])  # an example's own loss has no part in it
    losses = torch.stack((level + delta / 2, level - delta / 2))
    coefficients = weigh(LossStd(), PerExample(eps=eps).measure(losses))
    theirs = delta / delta.std(correction=0) / (2 * eps * 4)
    assert [c / (2 * eps) for c in coefficients] == pytest.approx(theirs.tolist(), rel=1e-4)


def test_z_score_by_hand():
    losses = torch.tensor([1.0, 3.0, 5.0])
    measured = Measured(losses, losses.mean(), losses.unsqueeze(1), 0.1)
    std = (8 / 3) ** 0.5
    assert weigh(ZScore(), measured) == pytest.approx([-2 / std / 3, 0.0, 2 / std / 3])
    pairs = torch.tensor([[1.0, 3.0], [5.0, 3.0]])
    measured = Measured(torch.zeros(2), losses.mean(), pairs, 0.1)
    assert weigh(ZScore(), measured) == pytest.approx([-1 / 2**0.5 / 2, 1 / 2**0.5 / 2])


@pytest.mark.parametrize("weighting", [LossStd, ZScore])
def test_ties_say_nothing(weighting):
    for measured in (
        OneSided(eps=1e-3, num_directions=3).measure(torch.full((4,), 2.0)),
        OneSided(eps=1e-3, num_directions=3).measure(torch.tensor([1.0, 2.0, 2.0, 2.0])),
        Central(eps=1e-3, num_directions=2).measure(torch.full((4,), 2.0)),
        Central(eps=1e-3, num_directions=2).measure(torch.tensor([2.0, 2.0, 2.0, 2.0 + 5e-7])),
        exact([0.0, 0.0]),
    ):
        assert not any(weigh(weighting(), measured))


@pytest.mark.parametrize("weighting", ["loss_std", "z_score", "ranks", "per_prompt"])
def test_one_loss_has_no_spread(weighting):
    for estimator in (OneSided(), components("estimator")["one_point"]()):
        with pytest.raises(UserError, match=f"weighting={weighting} .* losses.*raise estimator.num_directions"):
            Method.of("full", estimator, weighting)
    for name in ("central", "three_point", "leave_one_out", "forward_gradient", "hybrid"):
        if weighting != "per_prompt" or name not in ("forward_gradient", "hybrid"):
            Method.of("full", name, weighting)
    Method.of("full", OneSided(num_directions=2), weighting)


@pytest.mark.parametrize("name", ["z_score", "ranks", "per_prompt"])
def test_losses_of_different_rows_are_refused(name):
    with pytest.raises(UserError, match=rf"weighting={name} compares losses of the same rows.*use weighting=loss_std"):
        Method.of("full", "per_example", name)
    Method.of("full", "per_example", "loss_std")


def test_ranks_by_hand():
    """Five losses, two of them equal: -1/2 to 1/2 in quarters, and the equal ones share."""
    losses = torch.tensor([9.0, 1.0, 2.0, 2.0, 1e6])
    measured = OneSided(eps=0.1, num_directions=5).measure(torch.cat((torch.zeros(1), losses)))
    assert weigh(Ranks(), measured) == pytest.approx([r / 5 for r in (0.25, -0.5, -0.125, -0.125, 0.5)])
    pairs = Central(eps=0.1, num_directions=2).measure(torch.tensor([4.0, 1.0, 2.0, 3.0]))
    # ranks 3, 0, 1, 2 of 3
    assert weigh(Ranks(), pairs) == pytest.approx([(0.5 + 0.5) / 4, (-1 / 6 - 1 / 6) / 4])
    assert weigh(Ranks(), exact([4.0, -1.0])) == pytest.approx([(0.5 + 0.5) / 4, (-1 / 6 - 1 / 6) / 4])


def test_ranks_do_not_see_how_far_apart_losses_lie():
    losses = torch.rand(17, generator=torch.Generator().manual_seed(0))
    one = OneSided(num_directions=16)
    assert weigh(Ranks(), one.measure(losses)) == weigh(Ranks(), one.measure(losses.exp() ** 5))
    assert sum(weigh(Ranks(), one.measure(losses))) == pytest.approx(0, abs=1e-7)
    assert not any(weigh(Ranks(), one.measure(torch.full((17,), 2.0))))


def of_examples(losses: torch.Tensor, eps: float = 0.5) -> Measured:
    """[Q, S, B], as the step's queries hand them on."""
    means = losses.mean(2)
    return Measured(means[:, 0], means.mean(), means, eps, examples=losses)


def test_per_prompt_is_grpos_advantage_of_each_point():
    """One side: r_ij against the group's mean, over the group's deviation, averaged over prompts."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 9.0], [0.0, 0.0, 6.0]])  # 3 points, 3 prompts
    spread = rewards.std(0, correction=0)
    advantages = (rewards - rewards.mean(0)) / spread.where(spread > 0, torch.ones(3))
    coefficients = weigh(PerPrompt(), of_examples(-rewards.unsqueeze(1)))
    wanted = (-advantages.mean(1) / 3).tolist()  # losses: what is better goes down
    assert coefficients == pytest.approx(wanted, rel=1e-6)


def test_per_prompt_takes_prompts_of_any_difficulty_alike_and_the_other_scales_do_not():
    generator = torch.Generator().manual_seed(1)
    losses = torch.randn(4, 2, 5, generator=generator)
    harder = losses * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + torch.tensor([0.0, 7.0, -2.0, 1.0, 5.0])
    assert weigh(PerPrompt(), of_examples(harder)) == pytest.approx(weigh(PerPrompt(), of_examples(losses)), rel=1e-4)
    step = weigh(PerPrompt(scale="step"), of_examples(losses))
    assert step == pytest.approx(weigh(PerPrompt(scale="step"), of_examples(losses + torch.arange(5.0))), rel=1e-4)
    plain = weigh(PerPrompt(scale="none"), of_examples(losses))
    means = losses.mean(2)
    assert plain == pytest.approx(((means[:, 0] - means[:, 1]) / (2 * 0.5) / 4).tolist(), rel=1e-5)  # mean of slopes


def test_per_prompt_of_one_prompt_is_the_z_score():
    losses = torch.randn(6, 2, 1, generator=torch.Generator().manual_seed(2))
    for measured in (of_examples(losses), of_examples(losses[:, :1])):
        assert weigh(PerPrompt(), measured) == pytest.approx(weigh(ZScore(), measured), rel=1e-5)
    assert not any(weigh(PerPrompt(), of_examples(torch.ones(3, 1, 4))))


@pytest.mark.parametrize("estimator", ["forward_gradient", "backprop", "addax", "svrg"])
def test_per_prompt_needs_losses_at_the_points_of_a_step(estimator):
    with pytest.raises(UserError, match=r"use (estimator=central|weighting=mean)"):
        Method.of("full", estimator, "per_prompt")


# ------------------------------------------------------------------------------------------------------ by the slopes


def test_curvature_by_hand():
    measured = Measured(
        torch.tensor([2.0, 2.0, -4.0]),
        torch.tensor(0.0),
        torch.empty(3, 2),
        0.1,
        torch.tensor([0.5, 1024.0, -(3.0**10)]),
    )
    assert weigh(Curvature(), measured) == pytest.approx([2 / 3, 1 / 3, -4 / 9])
    assert weigh(Curvature(alpha=0.0), measured) == pytest.approx([2 / 3, 2 / 3, -4 / 3])
    assert weigh(Curvature(floor=2.0), measured) == pytest.approx([1 / 3, 1 / 3, -4 / 9])


def test_curvature_is_the_paper_step_where_the_learning_rate_is_eps():
    eps, losses = 1e-2, torch.tensor([1.0, 1.3, 1.1, 0.9, 1.2])
    measured = components("estimator")["three_point"](eps=eps, num_directions=2).measure(losses)
    second = torch.tensor([(1.3 - 2.0 + 1.1) / eps**2, (0.9 - 2.0 + 1.2) / eps**2])
    weights = 1 / second.abs().pow(0.1).clamp_min(1.0)
    wanted = torch.tensor([0.2, -0.3]) * weights / (2 * 2)
    assert [eps * c for c in weigh(Curvature(), measured)] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_curvature_needs_an_estimator_that_measures_it():
    with pytest.raises(UserError, match=r"weighting=curvature needs.*estimator=central.*use estimator=three_point"):
        Method.of("full", "central", "curvature")
    Method.of("full", "three_point", "curvature")


def test_clip_and_sign_by_hand():
    measured = exact([3.0, -0.5, -7.0, 0.0])
    assert weigh(Clip(bound=2.0), measured) == [0.5, -0.125, -0.5, 0.0]
    assert weigh(Sign(), measured) == [0.25, -0.25, -0.25, 0.0]
    assert weigh(Clip(bound=10.0), measured) == weigh(Mean(), measured)


# ---------------------------------------------------------------------------------------------- by the inner products


def some(q: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Measured, object]:
    """(Z [d, q], g [d], what exact slopes say, their inner products)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(d, q, generator=generator, dtype=torch.float64)
    g = torch.randn(d, generator=generator, dtype=torch.float64)
    return z, g, exact((z.T @ g).tolist()), lambda: z.T @ z


@pytest.mark.parametrize("q", [1, 3, 8])
def test_align_is_the_projection_on_the_span(q):
    z, g, measured, gram = some(q, 8)
    estimate = z @ torch.tensor(weigh(Align(ridge=1e-12), measured, gram), dtype=torch.float64)
    wanted = z @ (torch.linalg.pinv(z) @ g)
    torch.testing.assert_close(estimate, wanted, rtol=1e-4, atol=1e-5)
    if q == 8:  # they span everything
        torch.testing.assert_close(estimate, g, rtol=1e-4, atol=1e-5)


def test_align_of_directions_that_depend_on_each_other():
    z, g, _, _ = some(2, 8)
    z = torch.cat((z, -z), dim=1)
    measured = exact((z.T @ g).tolist())
    wanted = z @ torch.linalg.pinv(z) @ g
    for ridge in (0.0, 1e-6):
        coefficients = weigh(Align(ridge=ridge), measured, lambda: z.T @ z)
        torch.testing.assert_close(z @ torch.tensor(coefficients).double(), wanted, rtol=1e-4, atol=1e-5)
    assert weigh(Align(), exact([0.0, 0.0]), lambda: torch.zeros(2, 2)) == [0.0, 0.0]


def test_align_with_a_ridge_solves_what_it_says():
    _, _, measured, gram = some(3, 8)
    products = gram()
    ridged = products + 0.5 * products.trace() / 3 * torch.eye(3)
    wanted = torch.linalg.solve(ridged, measured.projected_grads.double())
    assert weigh(Align(ridge=0.5), measured, gram) == pytest.approx(wanted.tolist(), rel=1e-5)


@pytest.mark.parametrize("weighting", ["align", "kalman"])
def test_inner_products_go_with_slopes_only(weighting):
    for estimator in ("leave_one_out", "one_point", "kernel"):
        with pytest.raises(UserError, match=f"weighting={weighting} needs the slope.*estimator={estimator} "):
            Method.of("full", estimator, weighting)
    for estimator in ("central", "one_sided", "three_point", "forward_gradient", "per_example", "addax"):
        Method.of("full", estimator, weighting)


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_kalman_without_noise_is_the_mean_for_directions_at_right_angles(memory):
    slopes = [3.0, -1.0, 2.0]
    gram = lambda: 50 * torch.eye(3)  # noqa: E731
    if memory == 0:
        assert weigh(Kalman(noise=0.0, memory=0.0), exact(slopes), gram) == pytest.approx(weigh(Mean(), exact(slopes)))
    shrunk = weigh(Kalman(noise=2.0, prior=1.0, memory=0.0), exact(slopes), gram)
    assert shrunk == pytest.approx([p / 3 / (1 + 4) for p in slopes])


def test_kalman_without_noise_is_the_projection_at_the_length_of_the_mean():
    z, g, measured, gram = some(3, 8)
    estimate = z @ torch.tensor(weigh(Kalman(noise=0.0, memory=0.0), measured, gram)).double()
    length = z.square().sum(0).mean()
    torch.testing.assert_close(estimate, z @ torch.linalg.pinv(z) @ g * length / 3, rtol=1e-4, atol=1e-5)


def test_kalman_is_the_posterior_mean():
    """One by one or all at once: b = prior^2 R^T (prior^2 R R^T + noise^2 I)^-1 p."""
    _, _, measured, gram = some(4, 6)
    relation = gram() / gram().diagonal().mean()
    joint = 0.7**2 * relation @ relation.T + 0.3**2 * torch.eye(4)
    wanted = 0.7**2 * relation.T @ torch.linalg.solve(joint, measured.projected_grads.double()) / 4
    assert weigh(Kalman(prior=0.7, noise=0.3, memory=0.0), measured, gram) == pytest.approx(wanted.tolist(), rel=1e-4)


def test_kalman_without_noise_bears_directions_that_depend_on_each_other():
    z, g, _, _ = some(2, 8)
    z = torch.cat((z, -z), dim=1)
    estimate = (
        z @ torch.tensor(weigh(Kalman(noise=0.0, memory=0.0), exact((z.T @ g).tolist()), lambda: z.T @ z)).double()
    )
    ours = z[:, :2]
    wanted = ours @ torch.linalg.pinv(ours) @ g * ours.square().sum(0).mean() / 4
    assert float(torch.nn.functional.cosine_similarity(estimate, wanted, dim=0)) > 0.999


def test_kalman_learns_the_noise_from_what_it_did_not_foretell():
    weighting, gram = Kalman(noise=1.0, memory=0.25), lambda: 9.0 * torch.eye(2)
    state = weighting.init()
    weighting.coefficients(exact([2.0, 4.0]), gram, state)
    first = 0.75 * 1.0 + 0.25 * 4.0
    assert state == {"variance": pytest.approx(0.75 * first + 0.25 * 16.0)}
    for _ in range(200):
        coefficients = weighting.coefficients(exact([3.0, -3.0]), gram, state)
    assert state["variance"] == pytest.approx(9.0)
    assert coefficients.tolist() == pytest.approx([3 / (1 + 9) / 2, -3 / (1 + 9) / 2], rel=1e-4)


@pytest.mark.parametrize("name", components("weighting"))
def test_none_overwrites_what_was_measured_and_all_hand_on_what_is_not_finite(name):
    weighting = components("weighting")[name]()
    for bad in (None, float("nan")):
        slopes = torch.tensor([1.0, bad or -2.0, 0.5])
        losses = torch.stack((slopes, -slopes), 1) / 2
        each = torch.stack((losses, 2 * losses), 2)
        measured = Measured(slopes, torch.tensor(1.0), losses, 0.5, torch.tensor([1.0, 2.0, 3.0]), each)
        copies = [measured.projected_grads.clone(), losses.clone(), each.clone()]
        coefficients = weighting.coefficients(measured, lambda: 4 * torch.eye(3).double(), weighting.init())
        assert coefficients.isfinite().all() == (bad is None)
        for one, other in zip(copies, (measured.projected_grads, measured.losses, each), strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
