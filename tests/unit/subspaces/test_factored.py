"""Structured directions of matrices: formulas, scale, what a step comes to, bases and their change, bounded pieces."""

from __future__ import annotations

import logging
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from zoft.errors import UserError
from zoft.noise.direction import Direction, key_of
from zoft.noise.joint import Antithetic
from zoft.noise.source import LAWS
from zoft.subspaces import _factored, base
from zoft.subspaces._matrices import haar
from zoft.subspaces.cp import Cp
from zoft.subspaces.left import Left
from zoft.subspaces.outer import Outer
from zoft.subspaces.two_sided import TwoSided, near_square
from zoft.weights.tensors import Weights

D = Direction(5, 7, 1)
EVERY = [Left, TwoSided, Cp, Outer]
BASED = [Left, TwoSided, Cp]
every = pytest.mark.parametrize("kind", EVERY)
based = pytest.mark.parametrize("kind", BASED)


class Model(nn.Module):
    def __init__(self, **more: tuple[int, ...]) -> None:
        super().__init__()
        shapes = {"w": (30, 20), "same": (30, 20), "conv": (9, 4, 3, 3), "thin": (40, 2), "row": (1, 9)}
        for name, shape in (shapes | more | {"bias": (17,), "number": ()}).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def bound(kind, model: nn.Module | None = None, **fields):
    return kind(**{"rank": 3} | fields).bind(Weights(model or Model()))


def gradient_of(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------- the formulas


def test_left_is_s_p_a():
    coordinates = bound(Left)
    assert coordinates.shape("w") == (3, 20)
    p, identity = coordinates.bases(D, "w")
    assert identity is None
    a = coordinates.draw(D, "w", 0, 60).view(3, 20)
    torch.testing.assert_close(coordinates.z(D, "w"), (30 / 3) ** 0.5 * p @ a)


def test_two_sided_is_s_u_c_vt():
    coordinates = bound(TwoSided)
    assert coordinates.shape("w") == (3, 3)
    u, v = coordinates.bases(D, "w")
    c = coordinates.draw(D, "w", 0, 9).view(3, 3)
    torch.testing.assert_close(coordinates.z(D, "w"), (600 / 9) ** 0.5 * u @ c @ v.T)


def test_cp_is_s_u_tau_vt_with_columns_of_length_one():
    coordinates = bound(Cp)
    assert coordinates.shape("w") == (3,)
    u, v = coordinates.bases(D, "w")
    torch.testing.assert_close(torch.cat((u, v)).square().sum(0), torch.full((3,), 2.0))
    tau = coordinates.draw(D, "w", 0, 3)
    torch.testing.assert_close(coordinates.z(D, "w"), (600 / 3) ** 0.5 * u @ tau.diag() @ v.T)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("rank", [1, 3])
def test_outer_is_a_bt_over_the_root_of_r_and_its_coordinates_are_the_weights(rank, law):
    coordinates = bound(Outer, rank=rank, law=law)
    assert coordinates.shape("w") == (30, 20)
    a, b = coordinates.factors(D, "w")
    assert (a.shape, b.shape) == ((30, rank), (20, rank))
    torch.testing.assert_close(coordinates.z(D, "w"), a @ b.T)
    assert torch.linalg.matrix_rank(coordinates.z(D, "conv").view(9, 36), rtol=1e-5) == rank
    if law == "rademacher":
        assert set((a * rank**0.5).round().view(-1).tolist()) == {-1.0, 1.0}
    if law == "sphere":
        for name, tensor in coordinates.weights.tensors.items():
            assert float(coordinates.z(D, name).double().square().sum()) == pytest.approx(tensor.numel(), rel=1e-5)


def test_outer_has_other_factors_for_every_direction_and_the_opposite_ones_for_its_antithesis():
    coordinates = bound(Outer)
    assert not torch.equal(coordinates.z(Direction(0, 0), "w"), coordinates.z(Direction(0, 0, 1), "w"))
    coordinates.arrange("antithetic")
    assert isinstance(coordinates.source, Antithetic)
    for probe in (2, 3):
        a, b = coordinates.factors(Direction(0, 0, probe), "w")
        torch.testing.assert_close(a @ b.T, coordinates.z(Direction(0, 0, probe), "w"))
    assert torch.equal(coordinates.z(Direction(0, 0, 2), "w"), -coordinates.z(Direction(0, 0, 3), "w"))


def test_outer_says_of_directions_that_are_no_products_that_they_have_no_factors():
    coordinates = bound(Outer)
    coordinates.arrange("orthogonal", 2)
    assert coordinates.factors(Direction(0, 0, 1), "w") is None


# -------------------------------------------------------------------------------------------------- scale and estimates


@every
@pytest.mark.parametrize("law", LAWS)
def test_the_squared_length_is_that_of_the_full_space(kind, law):
    coordinates = bound(kind, law=law)
    squares = torch.tensor(
        [[coordinates.z(Direction(0, 0, s), n).square().mean() for n in ("w", "conv")] for s in range(400)]
    )
    errors = 4.5 * squares.std(0) / 200**0.5
    assert ((squares.mean(0) - 1).abs() <= errors + 1e-5).all()
    assert float(errors.max()) < 0.4


@pytest.mark.parametrize(
    ("kind", "law"),
    [(kind, "gaussian") for kind in EVERY] + [(Left, "rademacher"), (Outer, "rademacher"), (Outer, "sphere")],
)
def test_the_mean_estimate_is_the_claimed_projection_of_the_gradient(kind, law):
    """Of c z with c = <G, z>: s^2 P P^T G and its like; the full gradient for outer."""
    coordinates = bound(kind, law=law)
    g = gradient_of(30, 20)
    directions = torch.stack([coordinates.z(Direction(0, 0, s), "w").double() for s in range(1500)])
    estimates = (directions * g).sum((1, 2)).view(-1, 1, 1) * directions
    if kind is Outer:
        wanted = g
    else:
        left, right = (None if b is None else b.double() for b in coordinates.bases(Direction(0, 0), "w"))
        s = coordinates.gain("w")
        if kind is Cp:
            wanted = s**2 * left @ torch.einsum("mk,mn,nk->k", left, g, right).diag() @ right.T
        else:
            wanted = s**2 * left @ left.T @ g
            wanted = wanted if right is None else wanted @ right @ right.T
    errors = estimates.std(0) / 1500**0.5
    assert float(((estimates.mean(0) - wanted).abs() / errors).max()) < 5.5
    assert float(errors.norm() / wanted.norm()) < 1


@based
def test_gram_is_that_of_the_lifted_directions(kind):
    coordinates = bound(kind)
    directions = [Direction(1, 2, probe) for probe in range(3)]
    flat = torch.stack(
        [torch.cat([coordinates.z(d, n).double().view(-1) for n in coordinates.weights.tensors]) for d in directions]
    )
    torch.testing.assert_close(coordinates.gram(directions), flat @ flat.T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", [Left, TwoSided])
def test_a_step_is_longer_than_its_coordinates_by_the_gain(kind):
    coordinates = bound(kind)
    drawn = coordinates.draw(D, "w", 0, math.prod(coordinates.shape("w")))
    assert float(coordinates.z(D, "w").norm()) == pytest.approx(coordinates.gain("w") * float(drawn.norm()), rel=1e-5)
    assert coordinates.gain("bias") == 1


# ---------------------------------------------------------------------------------------------------------------- bases


def test_haar_is_orthonormal_and_uniform():
    bases = torch.stack([haar(key_of(Direction(0, s), "w"), 6, 2, torch.device("cpu")) for s in range(1500)])
    torch.testing.assert_close(bases.mT @ bases, torch.eye(2).expand(1500, 2, 2), rtol=0, atol=1e-5)
    assert float(bases.mean(0).abs().max()) < 4.5 * (1 / 6 / 1500) ** 0.5  # without the signs the diagonal is negative
    projections = (bases @ bases.mT).mean(0)
    torch.testing.assert_close(projections, torch.eye(6) / 3, rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", [Left, TwoSided])
def test_bases_hold_for_an_interval_for_all_directions_and_are_each_tensors_own(kind):
    coordinates = bound(kind, interval=3)
    first = coordinates.bases(Direction(1, 3, 0), "w")[0]
    assert coordinates.bases(Direction(1, 5, 4), "w")[0] is first
    assert coordinates.same_basis("w", Direction(1, 3), Direction(1, 5))
    others = [
        coordinates.bases(Direction(1, 2), "w")[0],
        coordinates.bases(Direction(2, 3), "w")[0],
        coordinates.bases(Direction(1, 3), "same")[0],
    ]
    for a, b in combinations([first, *others], 2):
        assert float((a.T @ b).norm()) < 0.9 * 3**0.5
    assert torch.equal(coordinates.bases(Direction(1, 3), "w")[0], first)
    assert not coordinates.same_basis("w", Direction(1, 2), Direction(1, 3))
    assert coordinates.same_basis("bias", Direction(1, 2), Direction(1, 3))


def test_cp_keeps_its_bases_for_the_run():
    coordinates = bound(Cp)
    assert coordinates.same_basis("w", Direction(1, 0), Direction(1, 10**6))
    assert not Cp.changes_basis
    assert coordinates.bases(Direction(1, 0), "w")[0] is coordinates.bases(Direction(1, 10**6), "w")[0]


@pytest.mark.parametrize("kind", [Left, TwoSided])
def test_a_state_is_carried_over_as_the_projection_of_its_step(kind):
    coordinates = bound(kind, interval=1, rank=8)
    old, new = Direction(1, 0), Direction(1, 1)
    state = torch.randn(coordinates.shape("w"), generator=torch.Generator().manual_seed(1))
    before = state.clone()

    def step(c, direction):
        return coordinates.lift(direction, "w", c.clone().view(-1), 0, 0, 600).view(30, 20)

    carried = coordinates.transport("w", state, old, new)
    left, right = coordinates.bases(new, "w")
    projected = left @ left.T @ step(state, old)
    projected = projected if right is None else projected @ right @ right.T
    torch.testing.assert_close(step(carried, new), projected, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, before)
    assert coordinates.transport("w", state, old, old) is state
    bias = torch.ones(17)
    assert coordinates.transport("bias", bias, old, new) is bias


@pytest.mark.parametrize("kind", [Left, TwoSided])
def test_directions_without_common_bases_are_not_summed(kind):
    coordinates = bound(kind, interval=2)
    count = torch.Size(coordinates.shape("w")).numel()
    coordinates.combination("w", 0, count, [(Direction(0, 2), 1.0), (Direction(0, 3), 1.0)])
    for other in (Direction(0, 4), Direction(1, 2)):
        for name in ("w", "bias"):  # before anything is written
            with pytest.raises(UserError, match=f"subspace={kind.name()} shares its bases"):
                coordinates.combination(name, 0, 5, [(Direction(0, 2), 1.0), (other, 1.0)])


# ---------------------------------------------------------------------------------------------- what moves, and what as


@every
def test_vectors_and_small_matrices_move_in_full(kind):
    coordinates = bound(kind, **({"reshape": False} if kind is TwoSided else {}))
    full = {"thin", "row", "bias", "number"}
    for name, tensor in coordinates.weights.tensors.items():
        if name in full:
            assert coordinates.shape(name) == tensor.shape
            assert coordinates.factors(D, name) is None
        else:
            assert torch.linalg.matrix_rank(coordinates.z(D, name).view(len(tensor), -1), rtol=1e-5) == 3
    assert coordinates.factors(D, "conv") is None


@pytest.mark.parametrize("kind", BASED)
def test_a_rank_above_every_tensor_is_warned_about(kind, caplog):
    with caplog.at_level(logging.WARNING):
        bound(kind, rank=1000)
    assert f"subspace={kind.name()}: no trained tensor has more than rank=1000" in caplog.text


def test_adapters_are_reshaped_near_square_and_embeddings_are_not():
    shapes = {"lora_a": (4, 64), "lora_b": (96, 4), "embedding": (5000, 256)}
    coordinates = bound(TwoSided, Model(**shapes))
    assert {n: (f.rows, f.columns) for n, f in coordinates.layouts.items()} == {
        "w": (30, 20),
        "same": (30, 20),
        "conv": (9, 36),
        "thin": (8, 10),
        "lora_a": (16, 16),
        "lora_b": (16, 24),
        "embedding": (5000, 256),
    }
    for name in ("lora_a", "lora_b"):
        form = coordinates.layouts[name]
        u, v = coordinates.bases(D, name)
        c = coordinates.draw(D, name, 0, 9).view(3, 3)
        wanted = (form.scale * u @ c @ v.T).reshape(shapes[name])
        torch.testing.assert_close(coordinates.z(D, name), wanted)
        assert coordinates.factors(D, name) is None
        rows = torch.tensor([3, 0, 3])
        assert torch.equal(coordinates.perturbed_rows(D, name, rows, 0.5), 0.5 * coordinates.z(D, name)[rows])
    plain = bound(TwoSided, Model(**shapes), reshape=False)
    assert plain.shape("lora_a") == (3, 3)
    assert (plain.layouts["lora_a"].rows, plain.layouts["lora_a"].columns) == (4, 64)
    assert "thin" not in plain.layouts


@pytest.mark.parametrize(
    ("count", "sides"), [(32768, (128, 256)), (36, (6, 6)), (7, (1, 7)), (600, (24, 25)), (1, (1, 1))]
)
def test_near_square(count, sides):
    assert near_square(count) == sides


@every
def test_mezos_own_stream_is_refused(kind):
    with pytest.raises(UserError, match=f"subspace={kind.name()} needs estimator.noise=counter"):
        kind().bind(Weights(Model()), "torch_sequential")
    with pytest.raises(UserError, match=r"estimator\.noise must be one of"):
        kind().bind(Weights(Model()), "nonsense")


# --------------------------------------------------------------------------------------------------------------- pieces


class Wide(nn.Module):
    """Matrices of many blocks: of several rows, of one row, and with a last one that is smaller."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"a": (37, 70), "b": (50, 9), "c": (5, 300)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@based
@pytest.mark.parametrize("block", [40, 210, 1 << 16])
def test_pieces_have_the_bits_of_the_whole_and_are_bounded(kind, block, monkeypatch):
    monkeypatch.setattr(_factored, "_BLOCK", block)
    coordinates = bound(kind, Wide())
    coordinates.keeps = False
    for name, tensor in coordinates.weights.tensors.items():
        monkeypatch.setattr(base, "_CHUNK", 1 << 18)
        whole = coordinates.z(D, name).view(-1)
        for chunk in (13, 100, 1000):
            monkeypatch.setattr(base, "_CHUNK", chunk)
            spans = list(coordinates.spans(name, 5, tensor.numel() - 3))
            assert [i for first, last in spans for i in range(first, last)] == list(range(5, tensor.numel() - 3))
            assert all(last - first <= chunk for first, last in spans)
            for start, stop in coordinates.chunks(name):
                given = coordinates.draw(D, name, start, stop)
                for first, last in coordinates.pieces(name, start, stop):
                    assert last - first <= chunk
                    assert torch.equal(coordinates.lift(D, name, given, start, first, last), whole[first:last])
        rows = torch.tensor([0, len(tensor) - 1, 2, 2])
        assert torch.equal(coordinates.perturbed_rows(D, name, rows, 1.0), whole.view(tensor.shape)[rows])


@based
def test_autocast_of_the_model_does_not_reach_the_directions(kind):
    coordinates = bound(kind)
    coordinates.keeps = False
    plain = coordinates.z(D, "w")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bound(kind).z(D, "w"), plain)


@based
def test_bases_made_in_inference_mode_can_be_used_outside(kind):
    coordinates = bound(kind)
    with torch.inference_mode():
        coordinates.z(D, "w")
    left = coordinates.bases(D, "w")[0]
    assert not left.is_inference()
