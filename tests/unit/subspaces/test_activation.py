"""Bases of what linear layers see: the formula, the ways to a basis, inputs that say little, what is saved, errors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_gpt2, tiny_opt
from zoft.engines.layerwise import Layerwise
from zoft.errors import UserError
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS
from zoft.optimizers.momentum import Momentum
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.subspaces.activation import Activation, linear_layers, orthonormal, power_iteration
from zoft.weightings.mean import Mean
from zoft.weights.tensors import Weights

D = Direction(5, 7, 1)


class Conv1D(nn.Module):
    """As in transformers: the weight is [n_in, n_out]."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.linear = nn.Linear(12, 30)
        self.turned = Conv1D(12, 30)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.narrow = nn.Linear(3, 8)


def bound(**fields):
    return Activation(**{"rank": 3} | fields).bind(Weights(Model()))


def inputs(tokens: int, n: int = 12, seed: int = 0, decay: float = 0.6) -> torch.Tensor:
    """Inputs whose singular values fall off, in directions that are the same for every seed."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(99)))[0]
    normals = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))
    return normals * decay ** torch.arange(n) @ basis.T


def random_basis(n: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, r, generator=torch.Generator().manual_seed(7)))[0]


def off(basis: torch.Tensor, wanted: torch.Tensor) -> float:
    """Sine of the largest angle between two spans."""
    return float(torch.linalg.matrix_norm(wanted - basis @ (basis.T @ wanted), 2))


def assert_orthonormal(basis: torch.Tensor) -> None:
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the formula


def test_a_linear_layer_moves_by_s_r_at_and_a_conv1d_the_other_way_round():
    coordinates = bound()
    h = inputs(40)
    for name in ("linear.weight", "turned.weight"):
        coordinates.observe(D, name, h)
    left, a = coordinates.bases(D, "linear.weight")
    assert left is None
    assert a.shape == (12, 3)
    assert coordinates.shape("linear.weight") == (30, 3)
    r = coordinates.draw(D, "linear.weight", 0, 90).view(30, 3)
    torch.testing.assert_close(coordinates.z(D, "linear.weight"), 2 * r @ a.T)

    turned, right = coordinates.bases(D, "turned.weight")
    assert right is None
    assert coordinates.shape("turned.weight") == (3, 30)
    r = coordinates.draw(D, "turned.weight", 0, 90).view(3, 30)
    torch.testing.assert_close(coordinates.z(D, "turned.weight"), 2 * turned @ r)
    for basis in (a, turned):
        assert_orthonormal(basis)


def test_what_has_no_inputs_moves_in_full():
    coordinates = bound()
    assert set(coordinates.layouts) == {"linear.weight", "turned.weight"}
    assert linear_layers(coordinates.weights) == {
        "linear.weight": False,
        "turned.weight": True,
        "narrow.weight": False,
    }  # the head is tied to the embedding
    for name in ("embedding.weight", "linear.bias", "narrow.weight"):
        assert coordinates.shape(name) == coordinates.weights.tensors[name].shape
    assert coordinates.inputs_wanted(D) == {"linear.weight", "turned.weight"}
    coordinates.backprop_names = frozenset({"linear.weight"})
    assert coordinates.inputs_wanted(D) == {"turned.weight"}


def test_the_basis_holds_the_gradient_of_a_layer_that_sees_no_more_tokens_than_it_has_columns():
    layer, h = nn.Linear(12, 30), inputs(3)
    coordinates = Activation(rank=3).bind(Weights(layer))
    coordinates.observe(D, "weight", h)
    gradient = torch.autograd.grad(layer(h).square().sum(), layer.weight)[0]
    a = coordinates.bases(D, "weight")[1]
    torch.testing.assert_close(gradient @ a @ a.T, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["linear.weight", "turned.weight"])
def test_the_mean_estimate_is_the_projection_of_the_gradient(law, rank_one, name):
    coordinates = bound(law=law, rank_one=rank_one)
    coordinates.observe(D, name, inputs(40))
    shape = coordinates.weights.tensors[name].shape
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.stack([coordinates.z(Direction(5, 7, probe), name).double() for probe in range(1000)])
    estimates = (directions * g).sum((1, 2)).view(-1, 1, 1) * directions
    left, right = (None if basis is None else basis.double() for basis in coordinates.bases(D, name))
    wanted = 4 * (g @ right @ right.T if left is None else left @ left.T @ g)  # s^2 = n / r
    errors = estimates.std(0) / 1000**0.5
    assert float(((estimates.mean(0) - wanted).abs() / errors).max()) < 5.5
    squares = directions.square().sum((1, 2))
    assert float(squares.mean()) == pytest.approx(360, abs=5 * float(squares.std()) / 1000**0.5 + 0.01)
    if rank_one:
        assert int(torch.linalg.matrix_rank(directions[0], rtol=1e-5)) == 1
        u, v = coordinates.factors(Direction(5, 7, 0), name)
        assert u.shape[1] == v.shape[1] == 1
        torch.testing.assert_close((u @ v.T).double(), directions[0], rtol=1e-5, atol=1e-5)
        if law == "sphere":
            torch.testing.assert_close(squares, torch.full((1000,), 360.0, dtype=torch.float64), rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------- the basis of a batch


def test_power_iteration_finds_the_leading_right_singular_vectors():
    h, start = inputs(200, 40, decay=0.5), random_basis(40, 5)
    wanted = torch.linalg.svd(h.double())[2][:5].T.float()
    errors = [off(power_iteration(h, start, iterations), wanted) for iterations in (1, 3, 10)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    assert off(power_iteration(h.to(torch.bfloat16), start, 10), wanted) < 0.02


def test_power_iteration_holds_a_million_to_one_between_singular_values():
    """As with the massive activations of large models: the small directions are not taken for rounding errors."""
    q = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0)))[0]
    h = torch.diag(torch.tensor([1e4, 1.0, 0.5] + [1e-3] * 27)) @ q.T
    basis = power_iteration(h, random_basis(30, 3), 5)
    assert off(basis, q[:, :3]) < 1e-2


@pytest.mark.parametrize("h", [torch.zeros(5, 12), inputs(1), inputs(2), inputs(1).repeat(9, 1), inputs(1) * 1e-30])
def test_inputs_that_say_too_little_leave_the_rest_of_the_basis_random(h):
    coordinates = bound(rank=4)
    start = coordinates.bases(D, "linear.weight")[1]
    coordinates.observe(D, "linear.weight", h)
    basis = coordinates.bases(D, "linear.weight")[1]
    assert_orthonormal(basis)
    if float(h.abs().max()) > 1e-10:
        span = torch.linalg.qr(h.T)[0][:, : torch.linalg.matrix_rank(h)]
        assert off(basis, span) < 1e-4
    elif not h.any():
        assert off(basis, start) < 1e-4


def test_orthonormal_makes_up_for_what_is_missing_and_keeps_signs():
    fill = random_basis(6, 3)
    column = torch.tensor([[0.0, -2.0, 0, 0, 0, 0]]).T
    basis = orthonormal(torch.cat((column, 2 * column), dim=1), fill)
    assert_orthonormal(basis)
    torch.testing.assert_close(basis[:, 0], column[:, 0] / 2)
    assert torch.equal(orthonormal(torch.zeros(6, 2), fill), orthonormal(fill, fill))


@pytest.mark.parametrize(
    "h", [torch.full((4, 12), float("nan")), torch.ones(4, 5), torch.ones(4, 12, dtype=torch.int64)]
)
def test_inputs_that_cannot_be_those_of_the_layer_are_passed_over(h):
    coordinates = bound()
    before = coordinates.bases(D, "linear.weight")
    coordinates.observe(D, "linear.weight", h)
    coordinates.observe(D, "embedding.weight", inputs(4))
    coordinates.observe(D, "linear.weight", inputs(4)[:0])
    assert coordinates.bases(D, "linear.weight") is before


def test_a_layer_that_is_met_twice_in_a_step_has_a_basis_of_all_it_has_seen():
    parts = [inputs(30, seed=1, decay=0.3), inputs(50, seed=2, decay=0.3)]
    twice, once = bound(), bound()
    for part in parts:
        twice.observe(D, "linear.weight", part)
    once.observe(D, "linear.weight", torch.cat(parts))
    assert off(twice.bases(D, "linear.weight")[1], once.bases(D, "linear.weight")[1]) < 0.05
    later = Direction(5, 8)
    twice.observe(later, "linear.weight", parts[0])
    once = bound()
    once.observe(later, "linear.weight", parts[0])
    assert torch.equal(twice.bases(later, "linear.weight")[1], once.bases(later, "linear.weight")[1])


def test_fault_21_the_basis_is_of_what_all_processes_have_seen():
    first, second = inputs(30, seed=1, decay=0.2), inputs(50, seed=2, decay=0.2).roll(5, dims=1)
    ranks = [bound(), bound()]
    for coordinates, h in zip(ranks, (first, second), strict=True):
        coordinates.begin(D)
        coordinates.observe(D, "linear.weight", h)
    sketches = [dict(one._sketches) for one in ranks]
    together = []
    for coordinates in ranks:
        coordinates.join(D, lambda _: sketches)
        together.append(coordinates.bases(D, "linear.weight")[1])
    assert torch.equal(*together)
    alone = bound()
    alone.begin(D)
    alone.observe(D, "linear.weight", torch.cat((first, second)))
    whole = alone.bases(D, "linear.weight")[1]
    only = power_iteration(first, random_basis(12, 3), 20)
    assert off(together[0], whole) < 0.1 < off(only, whole)


def test_fault_21_a_layer_that_only_another_process_has_seen_has_a_basis_too():
    here, other = bound(), bound()
    for coordinates, step in ((here, 1), (other, 2)):
        coordinates.begin(Direction(5, step))
        coordinates.observe(Direction(5, step), "linear.weight", inputs(40, seed=step))
    earlier = here.bases(Direction(5, 1), "linear.weight")[1]
    here.begin(Direction(5, 2))
    here.join(Direction(5, 2), lambda sketches: [sketches, dict(other._sketches)])
    assert off(here.bases(Direction(5, 2), "linear.weight")[1], other.bases(Direction(5, 2), "linear.weight")[1]) < 1e-5
    assert torch.equal(here.bases(Direction(5, 1), "linear.weight")[1], earlier)


def test_many_tokens_are_taken_in_pieces(monkeypatch):
    import zoft.subspaces.activation as module

    whole, pieces = bound(), bound()
    whole.observe(D, "linear.weight", inputs(50))
    monkeypatch.setattr(module, "_TOKENS", 16)
    pieces.observe(D, "linear.weight", inputs(50))
    torch.testing.assert_close(*(c.bases(D, "linear.weight")[1] for c in (whole, pieces)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ step after step


def test_a_batchs_basis_holds_for_its_step_and_a_state_is_carried_over():
    coordinates, name = bound(), "linear.weight"
    old, new = Direction(5, 7), Direction(5, 8)
    coordinates.observe(old, name, inputs(20, seed=1))
    before = coordinates.bases(old, name)[1]
    coordinates.observe(new, name, inputs(20, seed=2))
    after = coordinates.bases(new, name)[1]
    assert coordinates.bases(old, name)[1] is before
    assert not torch.equal(before, after)
    assert not coordinates.same_basis(name, old, new)
    assert coordinates.same_basis(name, new, Direction(5, 8, 3))
    state = torch.arange(90.0).view(30, 3).sin()
    carried = coordinates.transport(name, state, old, new)
    torch.testing.assert_close(carried @ after.T, state @ before.T @ after @ after.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="subspace=activation shares its bases"):
        coordinates.combination(name, 0, 5, [(old, 1.0), (new, 1.0)])


def test_the_basis_of_the_first_batch_stays():
    coordinates, name = bound(basis="first"), "linear.weight"
    assert coordinates.inputs_wanted(Direction(5, 0))
    coordinates.observe(Direction(5, 0), name, inputs(20))
    basis = coordinates.bases(Direction(5, 0), name)[1]
    assert not coordinates.inputs_wanted(Direction(5, 1))
    assert coordinates.bases(Direction(5, 999), name)[1] is basis
    assert coordinates.same_basis(name, Direction(5, 0), Direction(5, 999))
    coordinates.combination(name, 0, 5, [(Direction(5, 0), 1.0), (Direction(5, 1), 1.0)])
    assert [Activation(basis="first").observes_at(step) for step in (0, 1, 2)] == ["inputs", "", ""]
    assert [Activation(basis="oja", rank=64).observes_at(step) for step in (0, 1, 2)] == ["inputs"] * 3
    assert not Activation(basis="first").changes_basis
    assert Activation().changes_basis


OJA = {"basis": "oja", "rank": 4, "basis_columns": 6, "shared_columns": 2}


def test_ojas_basis_follows_the_batches_and_a_step_has_the_leading_and_some_of_the_others():
    coordinates, name = bound(**OJA), "linear.weight"
    coordinates.observe(Direction(5, 0), name, torch.randn(40, 12, generator=torch.Generator().manual_seed(3)))
    wanted = torch.linalg.svd(inputs(10000).double())[2][:2].T.float()
    errors, chosen = [off(coordinates.state_dict()["followed"][name][:, :2], wanted)], set()
    for step in range(1, 80):
        coordinates.observe(Direction(5, step), name, inputs(40, seed=step))
        k, active = coordinates.state_dict()["followed"][name], coordinates.bases(Direction(5, step), name)[1]
        assert k.shape == (12, 6)
        assert active.shape == (12, 4)
        assert_orthonormal(k)
        assert torch.equal(active[:, :2], k[:, :2])
        picked = [int((k == column.unsqueeze(1)).all(0).nonzero()) for column in active.T[2:]]
        assert len(set(picked)) == 2
        chosen |= set(picked)
        errors.append(off(k[:, :2], wanted))
    assert chosen == {2, 3, 4, 5}
    assert errors[-1] < 0.2 < errors[0]


def test_ojas_basis_has_no_more_columns_than_there_are_inputs():
    coordinates = bound(basis="oja", basis_columns=100, shared_columns=3)
    coordinates.observe(D, "linear.weight", inputs(20))
    assert coordinates.state_dict()["followed"]["linear.weight"].shape == (12, 12)
    coordinates.observe(Direction(5, 8), "linear.weight", torch.zeros(5, 12))
    assert_orthonormal(coordinates.state_dict()["followed"]["linear.weight"])
    active = coordinates.bases(Direction(5, 8), "linear.weight")[1]
    assert torch.equal(active, coordinates.state_dict()["followed"]["linear.weight"][:, :3])  # all of them are shared


# ----------------------------------------------------------------------------------------------------------- whole runs


class Run:
    """A model stepping by hand, as the trainer drives it."""

    def __init__(self, model=tiny_gpt2, estimator=None, **fields) -> None:
        self.model = model()
        estimator = estimator or OneSided(num_directions=2, eps=1e-3)
        self.method = Method(Activation(**{"rank": 2} | fields), estimator, Mean(), Momentum())
        coordinates = self.method.bind(Weights(self.model))
        self.session = Layerwise().bind(self.model, coordinates, lambda batch: self.model(**batch).loss)
        groups = [{"params": list(self.session.weights.tensors.values()), "weight_decay": 0.0}]
        self.zo_optimizer = ZOOptimizer(groups, self.method.optimizer, self.session, 1e-4)
        self.queries = StepQueries(self.method, self.zo_optimizer)
        self.counted = []

    def step(self) -> None:
        step = self.zo_optimizer.progress.steps
        batch = batch_for(self.model, seed=step)
        asked = self.queries.estimate(batch, self.method.estimator.directions(5, step))
        self.counted.append(asked.num_queries)
        assert asked.is_usable
        self.zo_optimizer.progress.steps += 1
        self.zo_optimizer.apply(asked)


WAYS = [{}, {"basis": "first"}, OJA, {"rank_one": True, "law": "sphere"}, OJA | {"rank_one": True}]
ways = pytest.mark.parametrize("way", WAYS, ids=str)


@ways
@pytest.mark.parametrize("model", [tiny_gpt2, tiny_opt])
def test_a_saved_run_continues_bit_for_bit(way, model):
    straight, first = Run(model, **way), Run(model, **way)
    for _ in range(5):
        straight.step()
    for _ in range(2):
        first.step()
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.zo_optimizer.state_dict()}, file)
    state = copy.deepcopy(first.zo_optimizer.state_dict()["subspace"])
    first.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Run(model, **way)
    second.model.load_state_dict(saved["model"])
    second.zo_optimizer.load_state_dict(saved["optimizer"])
    for name, (_, basis) in state["seen"].items():
        assert torch.equal(second.session.coordinates.state_dict()["seen"][name][1], basis)
    for _ in range(3):
        second.step()
    assert second.session.weights.digest() == straight.session.weights.digest()


@ways
def test_queries_are_those_that_are_claimed(way):
    for estimator in (Central(num_directions=2, eps=1e-3), OneSided(num_directions=2, eps=1e-3)):
        run = Run(estimator=estimator, **way)
        for _ in range(3):
            run.step()
        assert run.counted == [run.method.queries_at(step) for step in range(3)]


def test_all_linear_layers_of_a_model_are_seen():
    for model, kinds in ((tiny_gpt2, {"c_attn", "c_proj", "c_fc"}), (tiny_opt, {"k_proj", "fc1", "fc2"})):
        run = Run(model)
        run.step()
        coordinates = run.session.coordinates
        assert set(coordinates.state_dict()["seen"]) == set(coordinates.layouts)
        assert kinds <= {name.split(".")[-2] for name in coordinates.state_dict()["seen"]}
        assert not any("embed" in name or "wte" in name for name in coordinates.layouts)
        for name, (_, basis) in coordinates.state_dict()["seen"].items():
            assert_orthonormal(basis)
            assert not basis.is_inference(), name


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="subspace=activation needs the inputs of linear layers, and no trained tensor"):
        Activation().bind(Weights(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Conv2d(2, 3, 2))))


def test_a_rank_above_all_inputs_is_refused():
    with pytest.raises(UserError, match=r"subspace\.rank=12 leaves no linear layer .*the most is 12"):
        bound(rank=12)


def test_a_checkpoint_of_another_rank_is_refused():
    coordinates = bound()
    coordinates.observe(D, "linear.weight", inputs(20))
    with pytest.raises(UserError, match=r"basis of 3 columns for linear\.weight, this run has subspace\.rank=2"):
        bound(rank=2).load_state_dict(coordinates.state_dict())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"basis": "last"}, "basis must be one of batch, first, oja, got 'last'"),
        ({"basis": "oja", "rank": 200}, "basis_columns must be at least rank=200, got 128"),
        ({"basis": "oja", "rank": 40}, "shared_columns must be at most rank=40, got 48"),
        ({"step_size": 0.0}, "step_size must be above 0 and finite, got 0.0"),
        ({"power_iterations": 0}, "power_iterations must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Activation(**fields)
