"""The catalogue's update rules, each against its formula written out plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.unit.optimizers.test_optimizers import LR, estimate, model_of, run, terms_of, zo_optimizer_of
from zoft.engines.layerwise import Layerwise
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.optimizers.adam import Adam
from zoft.optimizers.adamu import AdaMU
from zoft.optimizers.adamw import AdamW
from zoft.optimizers.base import Estimate, norm_of
from zoft.optimizers.cone import Cone
from zoft.optimizers.conservative import Conservative
from zoft.optimizers.hessian import Hessian
from zoft.optimizers.muon import Muon, exact, newton_schulz, power_step
from zoft.optimizers.replay_adam import ReplayAdam
from zoft.optimizers.scalar_adam import ScalarAdam
from zoft.optimizers.sgd import SGD
from zoft.optimizers.sign import Sign
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces import base
from zoft.weights.tensors import Weights


class OnQuadratic:
    """L = sum_i a_i theta_i^2 / 2 (or what is given), stepping by hand."""

    def __init__(self, rule, curvatures, *, estimator="central", q=1, lr=1e-3, loss=None, decay=0.0):
        self.model = nn.Module()
        self.model.theta = nn.Parameter(torch.ones(len(curvatures)))
        self.a = torch.as_tensor(curvatures)
        self.weights = Weights(self.model)
        self.method = Method.of("full", estimator, "mean", rule)
        self.method.estimator.num_directions = q
        self.coordinates = self.method.bind(self.weights)
        loss = loss or (lambda theta: (self.a * theta.square()).sum() / 2)
        session = Layerwise().bind(self.model, self.coordinates, lambda batch: loss(self.model.theta))
        groups = [{"params": [self.model.theta], "weight_decay": decay}]
        self.zo_optimizer = ZOOptimizer(groups, rule, session, lr)
        self.queries = StepQueries(self.method, self.zo_optimizer)
        self.asked = None

    def step(self, count=1):
        for _ in range(count):
            directions = self.method.estimator.directions(0, self.zo_optimizer.progress.steps)
            self.asked = self.queries.estimate(None, directions, lr=self.zo_optimizer.param_groups[0]["lr"])
            self.zo_optimizer.apply(self.asked)
            self.zo_optimizer.progress.steps += 1

    def z(self, step, probe=0):
        """A direction as it is now, drawn anew."""
        self.coordinates.z_cache.clear()
        return self.coordinates.z(Direction(0, step, probe), "theta").clone()


# ---- rules of the estimate alone -------------------------------------------------------------------------------------


def test_sign_steps_by_the_learning_rate_in_every_coordinate():
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(zo_optimizer_of(model, Sign()), range(1))
    for name, gradient in estimate(model, 0).items():
        torch.testing.assert_close(model.get_parameter(name).data, before[name] - LR * gradient.sign())


def test_adamw_is_torchs():
    ours, theirs = model_of(), model_of()
    rule = AdamW()
    reference = torch.optim.AdamW(theirs.parameters(), lr=LR)
    defaults = reference.defaults
    assert (rule.adam_beta1, rule.adam_beta2, rule.adam_epsilon) == (*defaults["betas"], defaults["eps"])
    assert rule.weight_decay == defaults["weight_decay"]
    zo_optimizer = zo_optimizer_of(ours, rule, decay=rule.weight_decay)
    for step in range(5):
        run(zo_optimizer, range(step, step + 1))
        for parameter, gradient in zip(theirs.parameters(), estimate(ours, step).values(), strict=True):
            parameter.grad = gradient.clone()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_scalar_adam_divides_by_the_root_of_the_mean_square():
    model, rule = model_of(), ScalarAdam(adam_beta2=0.9, adam_epsilon=1e-3)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    zo_optimizer, v = zo_optimizer_of(model, rule), 0.0
    for step in range(4):
        run(zo_optimizer, range(step, step + 1))
        v = 0.9 * v + 0.1 * sum(c**2 for _, c in terms_of(step))
        root = math.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-3
        for name, gradient in estimate(model, step).items():
            wanted[name] = wanted[name] - LR * gradient / root
            torch.testing.assert_close(model.get_parameter(name).data, wanted[name], rtol=1e-5, atol=1e-6)
    assert zo_optimizer.moments["0.weight"] == {}, "no memory"


def test_scalar_adam_follows_the_length_of_the_gradient():
    """sum_j a_j^2 has the mean ||g||^2 / q, as the paper's (sum_j a_j)^2 has; and a tenth of its spread with q = 16."""
    generator, gradient, q = torch.Generator().manual_seed(0), torch.arange(1.0, 21.0), 16
    slopes = torch.randn(4000, q, 20, generator=generator) @ gradient
    ours, theirs = (slopes / q).square().sum(1), (slopes / q).sum(1).square()
    wanted = gradient.square().sum() / q
    for lengths in (ours, theirs):
        assert abs(lengths.mean() - wanted) < 4 * lengths.std() / 4000**0.5
    assert ours.std() < theirs.std() / 3


def test_scalar_adam_bears_coefficients_that_add_up_to_zero():
    rule = ScalarAdam()
    scaled = rule.coefficients([0.25, -0.25, 0.5, -0.5], rule.init())
    assert max(map(abs, scaled)) < 1


# ---- trying the step -------------------------------------------------------------------------------------------------


def test_conservative_goes_where_the_loss_is_lowest():
    rule = Conservative()
    assert rule.choose({0.0: 2.0, 1.0: 1.0, -1.0: 3.0}) == 1.0
    assert rule.choose({0.0: 2.0, 1.0: 4.0, -1.0: 1.0}) == -1.0
    assert rule.choose({0.0: 2.0, 1.0: 4.0, -1.0: 3.0}) == 0.0
    assert rule.choose({0.0: 2.0, 1.0: 2.0, -1.0: 2.0}) == 0.0, "nothing is gained"
    assert rule.choose({0.0: 2.0, 1.0: 1.0, -1.0: 1.0}) == 1.0, "the estimate's side"


@pytest.mark.parametrize(("estimator", "queries"), [("central", 5), ("one_sided", 4)])
def test_conservative_never_goes_up_and_counts_what_it_asks(estimator, queries):
    one = OnQuadratic(Conservative(), [1.0] * 10 + [50.0] * 5, lr=2e-2, estimator=estimator)
    chosen, before = set(), float("inf")
    for _ in range(30):
        start = one.model.theta.detach().clone()
        one.step()
        assert one.asked.num_queries == one.method.queries_at(0) == queries
        loss = float((one.a * one.model.theta.detach().square()).sum() / 2)
        assert loss <= before
        before = loss
        chosen.add(torch.equal(start, one.model.theta.detach()))
    assert chosen == {True, False}, "this learning rate is too large for some of the steps"


def test_conservative_decays_whatever_it_chooses():
    one = OnQuadratic(Conservative(), [0.0] * 4, lr=0.1, decay=0.5)
    one.step(2)
    torch.testing.assert_close(one.model.theta.detach(), torch.full((4,), 0.95**2))


# ---- moments from records --------------------------------------------------------------------------------------------


def test_replayed_adam_is_adam_while_the_window_holds_every_step():
    ours, theirs = model_of(), model_of()
    betas = {"adam_beta1": 0.7, "adam_beta2": 0.9, "adam_epsilon": 1e-5}
    run(zo_optimizer_of(ours, ReplayAdam(**betas)), range(6))
    run(zo_optimizer_of(theirs, Adam(**betas)), range(6))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_replayed_adam_forgets_what_is_older_than_its_window(chunk, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    model = model_of()
    zo_optimizer = zo_optimizer_of(model, ReplayAdam(history=3))
    wanted, past = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    for step in range(6):
        run(zo_optimizer, range(step, step + 1))
        past.insert(0, estimate(model, step))
        window = past[:3]
        for name in wanted:
            m = sum(0.7**k * g[name] for k, g in enumerate(window)) / sum(0.7**k for k in range(len(window)))
            v = sum(0.9**k * g[name] ** 2 for k, g in enumerate(window)) / sum(0.9**k for k in range(len(window)))
            wanted[name] = wanted[name] - LR * m / (v.sqrt() + 1e-5)
            torch.testing.assert_close(model.get_parameter(name).data, wanted[name], rtol=1e-5, atol=1e-6)
    assert zo_optimizer.moments["0.weight"] == {}, "no memory"
    assert len(zo_optimizer.records) == 2


def test_without_curvature_there_is_no_hessian():
    with pytest.raises(UserError, match=r"optimizer=hessian needs the curvature.*three_point"):
        Method.of("full", "central", "mean", "hessian")


# ---- directions around the momentum ----------------------------------------------------------------------------------


def test_a_cone_of_a_right_angle_is_sgd():
    flat, cone = (OnQuadratic(rule, [1.0, 2.0, 3.0]) for rule in (SGD(), Cone(angle=math.pi / 2)))
    for one in (flat, cone):
        one.step(4)
    torch.testing.assert_close(cone.model.theta, flat.model.theta, rtol=1e-6, atol=1e-7)


def test_without_a_momentum_a_direction_is_what_it_would_be_without_a_cone():
    flat, cone = (OnQuadratic(rule, [1.0] * 5) for rule in (SGD(), Cone(angle=0.1)))
    cone.zo_optimizer.begin(Direction(0, 0))
    assert torch.equal(cone.z(0), flat.z(0))


def test_the_momentum_is_the_running_mean_of_the_estimates_and_the_step_is_the_estimate():
    one = OnQuadratic(Cone(beta=0.8, angle=1.0), [1.0, 2.0, 3.0, 4.0], q=2, lr=1e-2)
    mean = torch.zeros(4)
    for step in range(5):
        before = one.model.theta.detach().clone()
        one.step()
        move = (before - one.model.theta.detach()) / 1e-2
        drawn = torch.stack([one.coordinates.z_cache[Direction(0, step, j), "theta"] for j in range(2)])
        wanted = (one.asked.projected_grads[:, None] * drawn).mean(0)
        torch.testing.assert_close(move, wanted, rtol=1e-3, atol=1e-4)
        mean = 0.8 * mean + 0.2 * wanted
        torch.testing.assert_close(one.zo_optimizer.moments["theta"]["momentum"], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [Cone(angle=1.0), AdaMU(alpha=math.sin(1.0) ** 2, explore_steps=0, anneal_steps=0)])
def test_directions_keep_their_length_and_lean_by_the_angle(rule):
    """E||z||^2 = d, <z, m> = sqrt(d) cos(angle), E[z z^T] = d cos^2 m m^T + sin^2 I, which the same with -m is."""
    d, draws, angle = 8, 4000, 1.0
    momentum = torch.linspace(-1.0, 2.0, d)
    unit = momentum.double() / momentum.double().norm()
    seconds = []
    for sign in (1.0, -1.0):
        one = OnQuadratic(rule, [1.0] * d)
        one.zo_optimizer._moments("theta")["momentum"].copy_(sign * momentum)
        one.zo_optimizer.begin(Direction(0, 0))
        z = torch.stack([one.z(0, probe) for probe in range(draws)]).double()
        assert abs(z.square().sum(1).mean() - d) < 4 * z.square().sum(1).std() / draws**0.5
        assert abs((z @ unit).mean() - sign * math.sqrt(d) * math.cos(angle)) < 4 / draws**0.5
        seconds.append(z.T @ z / draws)
    wanted = d * math.cos(angle) ** 2 * torch.outer(unit, unit) + math.sin(angle) ** 2 * torch.eye(d)
    for second in seconds:
        torch.testing.assert_close(second, wanted.double(), rtol=0, atol=0.2)


def test_the_uncertainty_is_annealed_in_three_phases():
    rule = AdaMU(alpha=0.4, explore_steps=10, anneal_steps=20)
    assert {rule.alpha_at(step) for step in range(11)} == {1.0}
    falling = [rule.alpha_at(step) for step in range(10, 31)]
    assert falling == sorted(falling, reverse=True)
    assert rule.alpha_at(20) == pytest.approx(0.7)
    assert rule.alpha_at(30) == rule.alpha_at(1000) == pytest.approx(0.4)
    assert AdaMU(alpha=0.4, explore_steps=3, anneal_steps=0).alpha_at(3) == pytest.approx(0.4)


def test_adamu_divides_by_the_mean_square_of_its_directions():
    one = OnQuadratic(AdaMU(beta1=0.5, beta2=0.8, explore_steps=1, anneal_steps=2), [1.0, 2.0, 3.0, 4.0], q=2, lr=1e-2)
    mean, squares = torch.zeros(4), torch.ones(4)
    for step in range(6):
        before = one.model.theta.detach().clone()
        one.step()
        drawn = torch.stack([one.coordinates.z_cache[Direction(0, step, j), "theta"] for j in range(2)])
        gradient = (one.asked.projected_grads[:, None] * drawn).mean(0)
        mean, squares = 0.5 * mean + 0.5 * gradient, 0.8 * squares + 0.2 * drawn.square().mean(0)
        wanted = before - 1e-2 * gradient / (squares.sqrt() + 1e-8)
        torch.testing.assert_close(one.model.theta.detach(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one.zo_optimizer.moments["theta"]["momentum"], mean, rtol=1e-5, atol=1e-6)


def test_lengths_are_over_all_tensors():
    states = {"a": {"m": torch.full((2, 3), 2.0)}, "b": {"m": torch.ones(1)}}
    assert norm_of(states, "m") == 5.0


# ---- the Hessian's diagonal ------------------------------------------------------------------------------------------


def test_the_diagonal_takes_in_what_the_second_differences_say():
    """In the paper's words: H <- (1 - a) H + a mean |L+ + L- - 2 L0| / (2 eps^2) H z^2, with z before it is shaped."""
    one = OnQuadratic(Hessian(smooth=0.1), [1.0, -4.0, 9.0], estimator="three_point", q=2, lr=1e-2)
    one.method.estimator.eps = 0.1
    plain = OnQuadratic(SGD(), [1.0] * 3)
    hessian = torch.ones(3)
    for step in range(5):
        before = one.model.theta.detach().clone()
        unshaped = torch.stack([plain.z(step, j) for j in range(2)])
        shaped = unshaped / hessian.sqrt()
        one.step()
        slopes = shaped @ (one.a * before)
        wanted = before - 1e-2 * (slopes[:, None] * shaped).mean(0)
        torch.testing.assert_close(one.model.theta.detach(), wanted, rtol=1e-3, atol=1e-3)
        bends = (one.a * shaped.square()).sum(1).abs()  # k_j = z'^T A z'
        hessian = 0.9 * hessian + 0.1 * (bends[:, None] / 2 * hessian * unshaped.square()).mean(0)
        torch.testing.assert_close(one.zo_optimizer.moments["theta"]["hessian"], hessian, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_diagonal_comes_to_the_shape_of_the_hessian(scale):
    """It stands still at (1 + d / 2) times the Hessian's diagonal, and comes there from below and from above."""
    a, rule = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), Hessian(smooth=0.1)
    start = scale * (1 + 6 / 2) * a
    state = {"hessian": start.clone()}
    drawn = rule.shape(torch.randn(20000, 6, generator=torch.Generator().manual_seed(0)), state, {})
    rule.update_from(_Held(list(drawn), (a * drawn.square()).sum(1).tolist()), state, 1)
    # E[k z^2] / 2 H = A + t / 2 H with t = sum A / H, here 6 / (4 scale)
    wanted = 0.9 * start + 0.1 * (a + 6 / (8 * scale) * start)
    torch.testing.assert_close(state["hessian"], wanted, rtol=0.05, atol=0)
    assert scale != 1 or torch.allclose(wanted, start)


class _Held(Estimate):
    """An estimate along given directions."""

    def __init__(self, directions, curvatures):
        self.directions = directions
        self.curvatures = curvatures
        self.terms = [(index, 0.0) for index in range(len(directions))]
        self.dense = None

    def combination(self, terms):
        return sum(c * self.directions[index] for index, c in terms)

    def squares(self, terms):
        return sum(c * self.directions[index] ** 2 for index, c in terms)


def test_the_diagonal_stays_positive_and_finite():
    rule, state = Hessian(smooth=0.5), {"hessian": torch.ones(3)}
    for curvature in (0.0, -1e6, 1e30, 0.0, 1e30, float(torch.finfo(torch.float32).max)):
        z = rule.shape(torch.tensor([0.0, 1.0, -3.0]), state, {})
        rule.update_from(_Held([z], [curvature]), state, 1)
        assert bool((state["hessian"] > 0).all())
        assert bool(torch.isfinite(state["hessian"]).all())


# ---- the matrix sign -------------------------------------------------------------------------------------------------


def matrix_of(rows, columns, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def sign_of(matrix):
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left * (values > 1e-5 * values[0])) @ right


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(8, 30, None), (30, 8, None), (12, 12, None), (9, 20, 3), (1, 5, None)]
)
def test_the_matrix_sign(rows, columns, rank):
    matrix = 1e-4 * matrix_of(rows, columns, rank)
    torch.testing.assert_close(exact(matrix).double(), sign_of(matrix), rtol=0, atol=1e-4)
    about = newton_schulz(matrix)
    values = torch.linalg.svdvals(about)[: rank or min(rows, columns)]
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    assert float(nn.functional.cosine_similarity(about.double().view(-1), sign_of(matrix).view(-1), dim=0)) > 0.98
    basis = torch.linalg.qr(matrix_of(columns, min(rows, columns), seed=1)).Q
    for _ in range(300):
        power = power_step(matrix, basis)
    torch.testing.assert_close(power.double(), sign_of(matrix), rtol=0, atol=5e-3)


def test_power_iteration_finds_the_largest_directions_alone():
    left, right = torch.linalg.qr(matrix_of(10, 6)).Q, torch.linalg.qr(matrix_of(20, 6, seed=1)).Q
    matrix = (left * torch.tensor([9.0, 7.0, 5.0, 1.0, 0.8, 0.5])) @ right.T
    basis = torch.linalg.qr(matrix_of(20, 3, seed=2)).Q
    for _ in range(20):
        power = power_step(matrix, basis)
    torch.testing.assert_close(power, left[:, :3] @ right[:, :3].T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["newton_schulz", "svd", "power"])
def test_nothing_to_go_by_is_no_step(method):
    rule = Muon(method=method)
    state = {key: torch.zeros(shape) for key, shape in rule.state_shapes((4, 6)).items()}
    for step in (1, 2):
        estimate = _coordinates(torch.zeros(4, 6))
        assert torch.equal(rule.update_from(estimate, state, step), torch.zeros(4, 6))
    update = rule.update_from(_coordinates(matrix_of(4, 6)), state, 3)
    assert bool(torch.isfinite(update).all())
    assert float(update.norm()) > 1.5


def _coordinates(matrix, gain=1.0):
    class Space:
        def shape(self, name):
            return tuple(matrix.shape)

        def gain(self, name):
            return gain

    return Estimate(Space(), "w", 0, matrix.numel(), [], dense=matrix.reshape(-1))


@pytest.mark.parametrize("method", ["newton_schulz", "svd", "power"])
def test_the_step_in_the_weights_does_not_depend_on_the_scale_of_the_subspace(method):
    rule, matrix = Muon(method=method, **({"top_k": 3} if method == "power" else {})), matrix_of(5, 9)
    steps = []
    for gain in (1.0, 16.0):
        state = {key: torch.zeros(shape) for key, shape in rule.state_shapes((5, 9)).items()}
        steps.append(gain * rule.update_from(_coordinates(gain * matrix, gain), state, 1))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)


def test_muon_steps_along_the_sign_of_the_running_mean_and_vectors_along_the_estimate():
    model = model_of()
    zo_optimizer = zo_optimizer_of(model, Muon(method="svd", beta=0.6, vector_scale=0.1))
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in range(3):
        run(zo_optimizer, range(step, step + 1))
        for name, gradient in estimate(model, step).items():
            mean[name] = 0.6 * mean[name] + 0.4 * gradient
            moved = sign_of(mean[name]).float() if gradient.dim() > 1 else 0.1 * gradient
            wanted[name] = wanted[name] - LR * moved
            torch.testing.assert_close(model.get_parameter(name).data, wanted[name], rtol=1e-4, atol=1e-5)
    assert zo_optimizer.moments["0.bias"] == {}


def test_muon_takes_a_tensor_of_more_dimensions_as_a_matrix():
    rule, tensor = Muon(method="svd"), matrix_of(3, 8).view(3, 2, 4)
    update = rule.update_from(_coordinates(tensor), {}, 1).view(3, 8)
    torch.testing.assert_close(update.double(), sign_of(tensor.view(3, 8)), rtol=0, atol=1e-4)


def test_muon_keeps_what_it_says():
    assert Muon().state_shapes((6, 4)) == {}
    assert Muon(beta=0.9).state_shapes((6, 4)) == {"momentum": (6, 4)}
    assert Muon(method="power", top_k=3).state_shapes((6, 2, 4)) == {"V": (8, 3)}
    assert Muon(method="power", beta=0.5).state_shapes((6, 4)) == {"momentum": (6, 4), "V": (4, 4)}
    assert Muon(method="power", beta=0.5).state_shapes((6,)) == {}


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (ScalarAdam, "adam_beta2", 1.0),
        (ScalarAdam, "adam_epsilon", 0.0),
        (ReplayAdam, "history", 0),
        (ReplayAdam, "adam_beta1", -0.1),
        (Cone, "angle", 0.0),
        (Cone, "angle", 2.0),
        (Cone, "beta", 1.0),
        (AdaMU, "alpha", 0.0),
        (AdaMU, "explore_steps", -1),
        (AdaMU, "beta2", 1.0),
        (Hessian, "smooth", 1.0),
        (Muon, "method", "qr"),
        (Muon, "top_k", 0),
        (Muon, "vector_scale", 0.0),
        (AdamW, "weight_decay", -1.0),
    ],
)
def test_bad_values_name_their_field(cls, field, value):
    with pytest.raises(UserError, match=rf"{cls.name()}\.{field} must be .*got {value!r}"):
        cls(**{field: value})
