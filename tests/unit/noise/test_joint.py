"""How directions hang together: pairs, right angles, signs of an example's own, sums; gathered as drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from zoft.component import components
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.joint import ACROSS, Antithetic, ExampleSigns, LinearCombination, Orthogonal, StateShaped
from zoft.noise.source import LAWS, CounterNoise
from zoft.subspaces.base import BoundSubspace
from zoft.weights.tensors import Weights

SHAPES = {"a": (7, 9), "b": (4, 3, 2), "v": (11,)}
CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, shapes=SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))))


def bound(across="iid", q=4, law="gaussian", subspace="full", shapes=SHAPES, **fields) -> BoundSubspace:
    coordinates = components("subspace")[subspace](law=law).bind(Weights(Model(shapes)))
    coordinates.arrange(across, q, **fields)
    return coordinates


def flat(coordinates: BoundSubspace, direction: Direction) -> torch.Tensor:
    return torch.cat([coordinates.z(direction, n).view(-1) for n in coordinates.weights.tensors]).double()


def of_step(coordinates: BoundSubspace, q: int, seed: int = 3, step: int = 5) -> torch.Tensor:
    return torch.stack([flat(coordinates, Direction(seed, step, probe)) for probe in range(q)])


# ---------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("law", LAWS)
def test_antithetic_directions_come_in_pairs(law):
    z, plain = of_step(bound("antithetic", 6, law), 6), of_step(bound("iid", 6, law), 3)
    assert torch.equal(z[1::2], -z[::2])
    assert torch.equal(z[::2], plain)  # the law of each is what it was


# --------------------------------------------------------------------------------------------------------- right angles


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("q", [2, 5, 98])
def test_orthogonal_directions_are_at_right_angles_and_as_long_as_in_the_full_space(law, q):
    z = of_step(bound("orthogonal", q, law), q)
    d = z.shape[1]
    torch.testing.assert_close(z @ z.T, d * torch.eye(q).double(), rtol=1e-3, atol=2e-2 * (1 + 5 * (q == d)))


def test_they_are_so_in_every_step_and_for_every_chunking(monkeypatch):
    from zoft.subspaces import base

    wanted = of_step(bound("orthogonal", 3), 3, step=8)
    monkeypatch.setattr(base, "_CHUNK", 13)
    chunked = bound("orthogonal", 3)
    of_step(chunked, 3, step=2)
    torch.testing.assert_close(of_step(chunked, 3, step=8), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(of_step(chunked, 3, step=2), wanted)


@pytest.mark.parametrize("law", ["gaussian", "sphere"])
def test_each_is_distributed_evenly_over_all_ways(law):
    """Haar: the mean of z z^T is 1 for each of them, also the last; with so few coordinates a tilt would show."""
    q, shapes = 3, {"a": (2, 2), "v": (1,)}
    coordinates = bound("orthogonal", q, law, shapes=shapes)
    z = torch.stack([of_step(coordinates, q, seed=seed, step=0) for seed in range(3000)])
    for probe in range(q):
        mean = z[:, probe].T @ z[:, probe] / len(z)
        torch.testing.assert_close(mean, torch.eye(5).double(), rtol=0, atol=0.12)  # about 4.5 standard errors
        fourth = (z[:, probe] ** 4).mean(0)
        torch.testing.assert_close(fourth, torch.full((5,), 3 * 5 / 7.0).double(), rtol=0.15, atol=0)


def test_more_directions_than_dimensions_are_refused():
    with pytest.raises(UserError, match=r"no 99 directions at right angles in a space of 98 dimensions: lower"):
        of_step(bound("orthogonal", 99), 1)


def test_signs_that_happen_to_be_alike_are_no_right_angles():
    """Random signs in few dimensions may be dependent: a sentence, and no directions made of nothing."""
    num_refused = 0
    for seed in range(20):
        try:
            z = of_step(bound("orthogonal", 4, "rademacher", shapes={"v": (4,)}), 4, seed=seed)
        except UserError as refused:
            assert "gaussian" in str(refused)  # noqa: PT017
            num_refused += 1
        else:
            torch.testing.assert_close(z @ z.T, 4 * torch.eye(4).double(), rtol=1e-4, atol=1e-3)
    assert num_refused


# --------------------------------------------------------------------------------------------------------- per example


@pytest.mark.parametrize("law", LAWS)
def test_an_examples_direction_has_signs_of_its_own_for_rows_and_columns(law):
    coordinates, plain = bound("iid", 2, law, per_example=True), bound("iid", 2, law)
    shared = Direction(3, 5, 1)
    for name, shape in SHAPES.items():
        z = plain.z(shared, name)
        assert torch.equal(coordinates.z(shared, name), z)
        for example in range(4):
            signs = coordinates.z(replace(shared, example=example), name) / z
            assert torch.equal(signs.abs(), torch.ones(shape))
            if len(shape) > 1:
                signs = signs.view(-1, shape[-1])
                assert torch.equal(signs * signs[:1] * signs[:, :1], signs[:1, :1].expand_as(signs))  # r s^T


def test_directions_of_two_examples_are_uncorrelated_and_those_of_one_as_they_were():
    """Over steps: E[z_i z_i^T] = 1, and E[z_i z_k^T] = 0 for two examples."""
    shapes = {"a": (3, 2), "v": (2,)}
    coordinates = bound(per_example=True, shapes=shapes)
    z = torch.stack(
        [torch.stack([flat(coordinates, Direction(0, step, 0, example=i)) for i in (0, 1)]) for step in range(4000)]
    )
    covariance, other = z[:, 0].T @ z[:, 0] / len(z), z[:, 0].T @ z[:, 1] / len(z)
    torch.testing.assert_close(covariance, torch.eye(8).double(), rtol=0, atol=0.11)
    assert float(other.abs().max()) < 5 * 3**0.5 / 4000**0.5


def test_tensors_and_probes_have_signs_of_their_own():
    coordinates = bound(per_example=True, shapes={"a": (60, 60), "b": (60, 60)})
    plain = bound(shapes={"a": (60, 60), "b": (60, 60)})

    def signs(name, probe, example):
        direction = Direction(0, 0, probe, example=example)
        ratio = coordinates.z(direction, name) / plain.z(replace(direction, example=None), name)
        return torch.cat((ratio[:, 0] * ratio[0, 0], ratio[0]))

    all_signs = [signs(n, p, i) for n in "ab" for p in (0, 1) for i in (0, 1)]
    for i, one in enumerate(all_signs):
        assert all(abs(float((one * two).mean())) < 4.5 / 120**0.5 for two in all_signs[:i])


# ---------------------------------------------------------------------------------------------------- sums, and shapes


@pytest.mark.parametrize("across", ACROSS)
def test_a_mixed_direction_is_the_sum_of_its_parts(across):
    coordinates = bound(across, 4, mixes=True)
    parts = tuple((Direction(3, 5, probe), factor) for probe, factor in enumerate((0.5, -2.0, 0.0, 1.5)))
    wanted = sum(factor * flat(coordinates, direction) for direction, factor in parts)
    torch.testing.assert_close(flat(coordinates, Direction(3, 5, -1, mix=parts)), wanted, rtol=1e-5, atol=1e-5)


def test_a_mix_of_examples_directions_is_the_sum_of_theirs():
    coordinates = bound(per_example=True, mixes=True)
    parts = tuple((Direction(3, 5, 0, example=i), 1.0 + i) for i in range(3))
    wanted = sum(factor * flat(coordinates, direction) for direction, factor in parts)
    torch.testing.assert_close(flat(coordinates, Direction(3, 5, -1, mix=parts)), wanted, rtol=1e-5, atol=1e-5)


def test_a_shape_is_applied_to_single_directions_and_before_their_sum():
    coordinates = bound(mixes=True, shape=lambda z, name, where: z.square_())
    plain = bound()
    parts = ((Direction(3, 5, 0), 1.0), (Direction(3, 5, 1), -1.0))
    for name in SHAPES:
        squares = [plain.z(d, name).square() for d, _ in parts]
        torch.testing.assert_close(coordinates.z(parts[0][0], name), squares[0])
        mixed = coordinates.z(Direction(3, 5, -1, mix=parts), name)
        torch.testing.assert_close(mixed, squares[0] - squares[1])


# ------------------------------------------------------------------------------------------------- drawn and gathered


def sources(law: str):
    """Every law around a source, and some around each other."""
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    coordinates = bound(law=law)

    def plain():
        return CounterNoise(law, sizes)

    def orthogonal(inner):
        return Orthogonal(inner, 4, coordinates._products, coordinates.dimension)

    def scaled(z, name, where):
        return z.mul_(torch.linspace(0.5, 2, sizes[name])[where])

    yield "antithetic", Antithetic(plain())
    yield "orthogonal", orthogonal(plain())
    yield "per example", ExampleSigns(plain(), SHAPES)
    yield "shaped", StateShaped(plain(), scaled)
    yield "mixed", LinearCombination(plain())
    yield "all", LinearCombination(ExampleSigns(StateShaped(orthogonal(plain()), scaled), SHAPES))


@pytest.mark.parametrize("law", LAWS)
def test_gathered_elements_are_the_drawn_ones(law):
    parts = ((Direction(3, 5, 0), 0.5), (Direction(3, 5, 3), -2.0))
    for kind, source in sources(law):
        for direction in (Direction(3, 5, 3), Direction(3, 5, 2, example=1), Direction(3, 5, -1, mix=parts)):
            if direction.mix and kind not in ("mixed", "all"):
                continue
            for name, shape in SHAPES.items():
                size = torch.Size(shape).numel()
                whole = source.draw(direction, name, 0, size, CPU, torch.float32)
                places = torch.randint(size, (5, 3), generator=torch.Generator().manual_seed(0))
                assert torch.equal(source.gather(direction, name, places), whole[places]), (kind, name)
                piece = source.draw(direction, name, 3, size - 2, CPU, torch.float32)
                assert torch.equal(piece, whole[3 : size - 2]), (kind, name)
