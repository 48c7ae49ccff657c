"""LOZO's directions: the formula, the scale, one V for an interval, a stream each, bounded pieces, momentum's way."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations

import pytest
import torch
from torch import nn

from tests.models import batch_for, tiny_llama, tiny_opt
from zoft.errors import UserError
from zoft.estimators.central import projected_grad
from zoft.noise import kernels
from zoft.noise.counter import sample
from zoft.noise.direction import Direction, key_of
from zoft.noise.source import LAWS
from zoft.subspaces import base, low_rank
from zoft.subspaces.full import Full
from zoft.subspaces.low_rank import BoundLowRank, LowRank
from zoft.weights.tensors import Weights, perturbed

D = Direction(5, 7, 1)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        shapes = {
            "w": (30, 20),
            "same": (30, 20),
            "conv": (9, 4, 3, 3),
            "thin": (40, 2),
            "flat": (2, 40),
            "row": (1, 9),
        }
        for name, shape in (shapes | {"bias": (17,), "number": ()}).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)))


def bound(model: nn.Module | None = None, **fields) -> BoundLowRank:
    return LowRank(**fields).bind(Weights(model or Model()))


# --------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("law", LAWS)
def test_z_is_u_vt_over_the_root_of_r(law, rank):
    coordinates = bound(law=law, rank=rank)
    for name, (m, n) in {"w": (30, 20), "conv": (9, 36)}.items():
        assert coordinates.shape(name) == (m, rank)
        u = coordinates.draw(D, name, 0, m * rank).view(m, rank).double()
        v = coordinates._basis(D, name).T.double()
        assert v.shape == (n, rank)
        z = coordinates.z(D, name)
        assert z.shape == coordinates.weights.tensors[name].shape
        torch.testing.assert_close(z.view(m, n).double(), u @ v.T / rank**0.5, rtol=1e-6, atol=1e-6)
        assert torch.linalg.matrix_rank(z.view(m, n).double(), rtol=1e-5) <= rank


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("law", LAWS)
def test_the_squared_length_is_that_of_the_full_space(law, rank):
    """E||z||^2 = m n for any rank, so that eps and the learning rate carry over."""
    coordinates = bound(law=law, rank=rank, interval=1)
    squares = torch.tensor(
        [[coordinates.z(Direction(0, s), n).square().mean() for n in ("w", "conv")] for s in range(300)]
    )
    torch.testing.assert_close(
        squares.mean(0), torch.ones(2), rtol=0, atol=4.5 * float(squares.std(0).max()) / 300**0.5
    )
    assert float(squares.std(0).max()) / 300**0.5 < 0.05


def test_a_step_is_the_papers():
    """Along a linear loss: c z here is c U V^T / r with the paper's c, whatever eps is."""
    coordinates = bound(rank=4)
    gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    z = coordinates.z(D, "w")
    u, v = coordinates.factors(D, "w")
    eps, uvt = 0.1, 2 * u @ v.T  # factors() divides by sqrt(r) = 2
    ours = projected_grad((gradient * eps * z).sum(), -(gradient * eps * z).sum(), eps) * z
    papers = projected_grad((gradient * eps * uvt).sum(), -(gradient * eps * uvt).sum(), eps) * uvt / 4
    torch.testing.assert_close(ours, papers)


def test_the_mean_estimate_is_the_gradient():
    """E[z z^T] = I: averaged over U and V, the estimate along a linear loss is its gradient."""
    coordinates = bound(rank=2, interval=1)
    gradient = torch.zeros(30, 20)
    gradient[3, 4] = 1.0
    estimates = torch.stack([z[3, 4] * z for z in (coordinates.z(Direction(0, s), "w") for s in range(3000))])
    off = (estimates.mean(0) - gradient).abs() / (estimates.std(0) / 3000**0.5)
    assert float(off.max()) < 5


@pytest.mark.parametrize("name", ["thin", "flat", "row", "bias", "number"])
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_what_is_no_larger_than_the_rank_moves_in_full(name, law):
    coordinates, full = bound(law=law, rank=2), Full(law).bind(Weights(Model()))
    assert coordinates.shape(name) == coordinates.weights.tensors[name].shape
    assert torch.equal(coordinates.z(D, name), full.z(D, name))
    assert coordinates.factors(D, name) is None


def test_a_kernel_has_a_direction_of_low_rank_but_no_factors_that_a_linear_layer_would_mistake():
    assert bound().factors(D, "conv") is None


def test_sphere_takes_all_coordinates_together():
    coordinates = bound(law="sphere")
    drawn = [coordinates.draw(D, n, 0, torch.Size(coordinates.shape(n)).numel()) for n in coordinates.weights.tensors]
    count = sum(len(u) for u in drawn)
    assert count == 30 * 2 * 2 + 9 * 2 + 80 + 80 + 9 + 17 + 1
    assert float(sum(u.double().square().sum() for u in drawn)) == pytest.approx(count, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- U's and V


def test_v_is_shared_for_an_interval_and_by_all_directions_of_a_step_and_u_is_fresh():
    coordinates = bound(interval=3)
    factors = {(s, p): coordinates.factors(Direction(1, s, p), "w") for s in range(7) for p in range(2)}
    for (a, (u_a, v_a)), (b, (u_b, v_b)) in combinations(factors.items(), 2):
        assert not torch.equal(u_a, u_b)
        assert torch.equal(v_a, v_b) == (a[0] // 3 == b[0] // 3)
    assert not torch.equal(coordinates.factors(Direction(2, 0), "w")[1], factors[0, 0][1])  # another seed


def test_every_u_and_v_has_a_stream_of_its_own():
    model = nn.ModuleList(nn.Linear(2000, 2000, bias=False) for _ in range(2))
    coordinates = bound(model, rank=2)
    drawn = [f.reshape(-1) for name in coordinates.weights.tensors for f in coordinates.factors(Direction(0, 0), name)]
    drawn.append(sample("gaussian", key_of(Direction(0, 0), "0.weight"), 2000, 6000))  # further on in U's stream
    for a, b in combinations(drawn, 2):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 4.5 / 4000**0.5


def test_v_does_not_depend_on_the_law():
    assert torch.equal(bound(law="rademacher").factors(D, "w")[1], bound(law="gaussian").factors(D, "w")[1])


def test_rademacher_u_is_of_signs():
    assert set(bound(law="rademacher").draw(D, "w", 0, 60).tolist()) == {-1.0, 1.0}


def test_nothing_depends_on_the_order_in_which_it_is_asked_for():
    names, steps = ["w", "same", "conv", "bias"], [0, 49, 50, 51, 149]
    forward, backward = bound(), bound()
    asked = {(s, n): forward.z(Direction(0, s), n).clone() for s in steps for n in names}
    torch.manual_seed(123)
    assert all(torch.equal(backward.z(Direction(0, s), n), asked[s, n]) for s, n in reversed(asked))


def test_directions_that_do_not_share_v_are_not_summed():
    coordinates = bound()
    with pytest.raises(
        UserError, match=r"shares V between the directions of a step.*subspace=full with direction_seeds"
    ):
        coordinates.combination("w", 0, 60, [(Direction(1, 0), 1.0), (Direction(2, 0, 1), 1.0)])


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 600), (0, 1), (7, 9), (19, 21), (13, 587), (40, 60), (599, 600)])
@pytest.mark.parametrize("piece", [1, 25, 1 << 18])
def test_a_piece_may_begin_and_end_anywhere(keeps, start, stop, piece, monkeypatch):
    monkeypatch.setattr(low_rank, "_PIECE", piece)
    model = Model()
    with torch.no_grad():
        model.w.normal_(generator=torch.Generator().manual_seed(0))
    coordinates = bound(model)
    coordinates.keeps = keeps
    z, weight = coordinates.z(D, "w").view(-1), model.w.data.view(-1)
    outs = [torch.empty(stop - start) for _ in range(2)]
    coordinates.perturb(D, "w", start, [0.5, -2.0], outs)
    for out, scale in zip(outs, (0.5, -2.0), strict=True):
        assert torch.equal(out, perturbed(weight[start:stop], z[start:stop], scale))
    total = torch.zeros(stop - start)
    coordinates.add_(total, D, "w", start, 0.25)
    assert torch.equal(total, z[start:stop] * 0.25)


def test_a_single_out_may_be_the_weight_itself():
    model = Model()
    coordinates = bound(model)
    coordinates.keeps = False
    wanted = perturbed(model.w.data, coordinates.z(D, "w"), 0.5)
    coordinates.perturb(D, "w", 0, [0.5], [model.w.data.view(-1)])
    assert torch.equal(model.w.data, wanted)


def test_neither_a_query_nor_a_step_makes_more_than_a_piece_at_a_time(monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", 100)
    monkeypatch.setattr(low_rank, "_PIECE", 100)
    pieces = []
    real = low_rank._product
    monkeypatch.setattr(low_rank, "_product", lambda *args: pieces.append(real(*args)) or pieces[-1])
    coordinates = bound()
    coordinates.keeps = False
    coordinates.perturb(D, "w", 3, [1.0], [torch.empty(590)])
    with kernels.using("cpu", None):  # the compiled kernel makes no piece at all
        coordinates.add_(torch.zeros(600), D, "w", 0, 1.0)
    for start, stop in coordinates.chunks("w"):
        assert start % 2 == stop % 2 == 0
        update = coordinates.combination("w", start, stop, [(D, 1.0)])
        for first, last in coordinates.pieces("w", start, stop):
            assert first % 20 == last % 20 == 0
            assert last - first <= 100
            coordinates.lift(D, "w", update, start, first, last)
    coordinates.perturbed_rows(D, "w", torch.tensor([4, 29]), 1.0)
    assert len(pieces) > 15
    assert max(piece.numel() for piece in pieces) <= 100


def test_adding_is_one_addition(monkeypatch):
    """engine=in_place reads from the version of a piece what an interrupt has left undone."""
    monkeypatch.setattr(low_rank, "_PIECE", 50)
    piece = Model().w.data.view(-1)[7:500]
    bound().add_(piece, D, "w", 7, 1.0)
    assert piece._version == 1


def test_it_is_said_where_nothing_is_of_low_rank(caplog):
    bound(nn.LayerNorm(8))
    assert "no trained tensor has more than rank=2 rows and columns" in caplog.text
    caplog.clear()
    bound()
    assert not caplog.text


def test_rows_of_a_table_need_their_own_rows_of_u_only(monkeypatch):
    coordinates = bound(nn.Embedding(1000, 16))
    rows = torch.tensor([999, 3, 3])
    wanted = perturbed(coordinates.weights.tensors["weight"].data, coordinates.z(D, "weight"), 0.5)[rows]
    monkeypatch.setattr(coordinates.source, "draw", None)
    assert torch.equal(coordinates.perturbed_rows(D, "weight", rows, 0.5), wanted)


def test_lifting_does_not_overwrite_the_coordinates():
    coordinates = bound()
    update = torch.arange(60.0)
    coordinates.lift(D, "w", update, 0, 0, 600)
    assert torch.equal(update, torch.arange(60.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_directions_do_not_depend_on_the_weights_dtype(dtype):
    assert torch.equal(bound(Model(dtype)).z(D, "w"), bound().z(D, "w"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bits():
    on_gpu = bound(Model(device="cuda"))
    for name in on_gpu.weights.tensors:
        assert torch.equal(on_gpu.z(D, name).cpu(), bound().z(D, name))


# ----------------------------------------------------------------------------------------------------------- transport


def test_transport_is_lozo_ms():
    coordinates = bound(rank=3, interval=10)
    old, new = Direction(0, 9), Direction(0, 10)
    momentum = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    carried = coordinates.transport("w", momentum, old, new)
    v_old, v_new = (coordinates.factors(d, "w")[1].double() for d in (old, new))
    torch.testing.assert_close(carried.double(), momentum.double() @ v_old.T @ v_new / 20, rtol=1e-5, atol=1e-6)
    assert carried.dtype == torch.float32
    assert torch.equal(momentum, torch.randn(30, 3, generator=torch.Generator().manual_seed(0)))


def test_transport_is_nothing_within_an_interval_and_for_what_moves_in_full():
    coordinates = bound(interval=10)
    state = torch.ones(30, 2)
    assert coordinates.transport("w", state, Direction(0, 10), Direction(0, 19)) is state
    assert coordinates.transport("bias", state, Direction(0, 9), Direction(0, 10)) is state


def test_transport_keeps_the_step_as_far_as_the_new_basis_holds_it():
    """Of N V_old^T it is the part within V_new, up to V^T V = n I; a state left as it is would be none of it."""
    coordinates = bound(nn.Linear(5000, 30, bias=False), rank=2, interval=1)
    old, new = Direction(0, 0), Direction(0, 1)
    state = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    v_old, v_new = (coordinates.factors(d, "weight")[1] for d in (old, new))
    step = state @ v_old.T
    projected = step @ v_new @ torch.linalg.inv(v_new.T @ v_new)
    carried = coordinates.transport("weight", state, old, new)
    assert float((carried - projected).norm() / projected.norm()) < 0.1
    assert float(carried.norm() / state.norm()) < 5 * (2 / 5000) ** 0.5  # nearly all of it is outside


# ----------------------------------------------------------------------------------------------- what cannot be; models


def test_refusals_say_what_works():
    with pytest.raises(UserError, match=r"noise=torch_sequential.*subspace=low_rank needs estimator.noise=counter"):
        LowRank().bind(Weights(Model()), "torch_sequential")
    with pytest.raises(UserError, match=r"estimator.noise must be one of counter, torch_sequential, got 'white'"):
        LowRank().bind(Weights(Model()), "white")
    with pytest.raises(UserError, match=r"low_rank.rank must be at least 1, got 0"):
        LowRank(rank=0)
    with pytest.raises(UserError, match=r"low_rank.interval must be at least 1, got 0"):
        LowRank(interval=0)


@pytest.mark.parametrize("make", [tiny_opt, tiny_llama])
def test_a_model_has_matrices_and_vectors_and_tied_ones_once(make):
    model = make()
    coordinates = bound(model)
    for name, tensor in model.named_parameters():
        assert coordinates.shape(name) == ((len(tensor), 2) if tensor.dim() == 2 else tensor.shape)
    assert "lm_head.weight" not in coordinates.weights.tensors or make is tiny_llama
    assert model(**batch_for(model)).loss.isfinite()


def test_given_seeds_are_refused_since_each_would_choose_another_basis():
    from zoft import ZOTrainer

    with pytest.raises(UserError, match=r"direction_seeds.*subspace=low_rank keeps.*subspace=full"):
        ZOTrainer(model=torch.nn.Linear(2, 2), subspace="low_rank", direction_seeds=[1, 2])


def test_momentum_is_carried_over_when_the_basis_changes():
    """LOZO-M: the optimizer projects the running mean onto the new V before it is used."""
    from zoft.engines.in_place import InPlace
    from zoft.optimizers.momentum import Momentum
    from zoft.step.estimate import StepEstimate
    from zoft.step.update import ZOOptimizer

    layer = torch.nn.Linear(6, 5, bias=False)
    coordinates = LowRank(rank=2, interval=2).bind(Weights(layer))
    session = InPlace().bind(layer, coordinates, lambda _: torch.zeros(()))
    zo_optimizer = ZOOptimizer([{"params": list(layer.parameters())}], Momentum(beta=0.5), session, 0.1)
    mean = torch.zeros(5, 2)
    for step in range(4):
        direction = Direction(3, step)
        if step == 2:
            mean = coordinates.transport("weight", mean, Direction(3, 1), direction)
        zo_optimizer.apply(StepEstimate.of([(direction, 2.0)]))
        estimate = coordinates.combination("weight", 0, 10, [(direction, 2.0)]).view(5, 2)
        mean = Momentum(beta=0.5).update(estimate.view(-1), {"momentum": mean.view(-1)}, step + 1).view(5, 2).clone()
        torch.testing.assert_close(zo_optimizer.moments["weight"]["momentum"], mean)
    saved = zo_optimizer.state_dict()
    assert saved["history"]["weight"] == [4, asdict(Direction(3, 3))]


def test_adam_counts_the_updates_of_each_tensor():
    """A block that moves for the first time has no history to correct for."""
    from zoft.engines.in_place import InPlace
    from zoft.optimizers.adam import Adam
    from zoft.step.estimate import StepEstimate
    from zoft.step.update import ZOOptimizer
    from zoft.subspaces.blocks import Blocks

    model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(2)))
    coordinates = Blocks(interval=10).bind(Weights(model))
    session = InPlace().bind(model, coordinates, lambda _: torch.zeros(()))
    zo_optimizer = ZOOptimizer([{"params": list(model.parameters())}], Adam(), session, 1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    for step in (0, 10):
        zo_optimizer.progress.updates = 1000 * step
        zo_optimizer.apply(StepEstimate.of([(Direction(0, step), 1.0)]))
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close((parameter - start).abs(), torch.full((3, 3), 1e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_a_compiled_product_gives_the_bits_of_the_eager_one(rank):
    from zoft.noise.source import prepare

    if prepare(1 << 30, torch.device("cpu")) != "compiled":
        pytest.skip("there is no compiler")
    layer = torch.nn.Linear(1500, 70, bias=False)
    coordinates = LowRank(rank=rank).bind(Weights(layer))
    start = torch.randn(70 * 1500, generator=torch.Generator().manual_seed(0))
    whole, eager, ragged = start.clone(), start.clone(), start.clone()
    coordinates.add_(whole, Direction(0, 0), "weight", 0, 0.3)
    for first, last in ((0, 1501), (1501, 70 * 1500)):
        coordinates.add_(ragged[first:last], Direction(0, 0), "weight", first, 0.3)
    with kernels.using("cpu", None):
        coordinates.add_(eager, Direction(0, 0), "weight", 0, 0.3)
    assert not torch.equal(whole, start)
    assert torch.equal(whole, eager)
    assert torch.equal(ragged, eager)
