"""Every subspace: a perturbed weight is W + s z to the bit however it is asked for; z is as long as in the full one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import nn

from tests.contract.discovered import DTYPES, SUBSPACES, coordinates_of, settings
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS
from zoft.subspaces import base
from zoft.weights.tensors import perturbed

DIRECTIONS = [Direction(3, 4, 0), Direction(3, 4, 1)]
TERMS = list(zip(DIRECTIONS, (0.5, -2.0), strict=True))


class Layer(nn.Module):
    """A tensor of every kind: a table of rows, a wide and a tall matrix, a kernel, a vector, a number."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"table": (40, 6), "wide": (5, 33), "tall": (50, 4), "narrow": (1, 30), "kernel": (7, 3, 2, 2)}
        shapes |= {"vector": (19,), "number": ()}
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def coordinates(subspace, law="gaussian", dtype="fp32", keeps=False):
    layers = nn.ModuleList(Layer(DTYPES[dtype]) for _ in range(2))
    head = nn.Linear(3, 9)
    for parameter in head.parameters():  # a subspace may choose by the weights: the same ones every time
        parameter.data = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
    bound = coordinates_of(subspace, nn.ModuleDict({"layers": layers, "head": head}), law, interval=1)
    bound.keeps = bound.keeps and keeps
    return bound


every = pytest.mark.parametrize(
    ("subspace", "law", "dtype"), [(s, *setting) for s in SUBSPACES for setting in settings(s, LAWS, DTYPES)]
)


@every
@pytest.mark.parametrize("keeps", [True, False])
def test_every_way_to_a_perturbed_weight_gives_the_same_bits(subspace, law, dtype, keeps, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", 50)
    bound = coordinates(subspace, law, dtype, keeps)
    before = bound.weights.digest()
    for step in range(3):
        direction = Direction(3, step)
        for name, tensor in bound.weights.tensors.items():
            z = bound.z(direction, name)
            assert z.shape == tensor.shape
            assert z.dtype == torch.float32
            wanted = {scale: perturbed(tensor.data, z, scale).view(-1) for scale in (0.1, -0.3)}
            for start, stop in pairwise(sorted({0, tensor.numel() // 3, tensor.numel() // 3 + 1, tensor.numel()})):
                outs = [torch.empty(stop - start, dtype=tensor.dtype) for _ in wanted]
                bound.perturb(direction, name, start, list(wanted), outs)
                assert all(torch.equal(out, w[start:stop]) for out, w in zip(outs, wanted.values(), strict=True))
                total = torch.ones(stop - start)
                bound.add_(total, direction, name, start, 0.7)
                assert torch.equal(total, torch.ones(stop - start).add_(z.view(-1)[start:stop] * 0.7))
            if tensor.dim() == 2:
                rows = torch.tensor([len(tensor) - 1, 0, 0, len(tensor) // 2])
                assert torch.equal(
                    bound.perturbed_rows(direction, name, rows, 0.1), wanted[0.1].view(tensor.shape)[rows]
                )
            if bound.moves(direction, name):
                assert tensor.numel() < 10 or float(z.abs().max()) > 0
            else:
                assert not z.any()
    assert bound.weights.digest() == before


@every
@pytest.mark.parametrize("chunk", [13, 1 << 20])
def test_lifted_coordinates_are_the_direction(subspace, law, dtype, chunk, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    bound = coordinates(subspace, law, dtype)
    for name, tensor in bound.weights.tensors.items():
        if not bound.moves(DIRECTIONS[0], name):
            continue
        for terms in ([(DIRECTIONS[0], 1.0)], TERMS):
            step, covered = torch.zeros(tensor.numel()), []
            for start, stop in bound.chunks(name):
                update = bound.combination(name, start, stop, terms)
                for first, last in bound.pieces(name, start, stop):
                    step[first:last] += bound.lift(DIRECTIONS[0], name, update, start, first, last)
                    covered.append((first, last))
            assert [i for first, last in covered for i in range(first, last)] == list(range(tensor.numel()))
            wanted = sum(bound.z(direction, name) * c for direction, c in terms).view(-1)
            if len(terms) == 1:
                assert torch.equal(step, wanted)
            torch.testing.assert_close(step, wanted, rtol=1e-5, atol=1e-5)
        count = prod(bound.shape(name))
        assert [i for start, stop in bound.chunks(name) for i in range(start, stop)] == list(range(count))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_factors_where_there_are_some_multiply_to_the_direction(subspace, law):
    bound = coordinates(subspace, law)
    for name, tensor in bound.weights.tensors.items():
        factors = bound.factors(DIRECTIONS[1], name)
        if factors is not None:
            left, right = factors
            assert (len(left), len(right)) == tensor.shape
            torch.testing.assert_close(left @ right.T, bound.z(DIRECTIONS[1], name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_direction_is_as_long_as_in_the_full_space(subspace, law):
    """E||z||^2 of a tensor is its number of elements, so that eps and learning rate carry over between subspaces."""
    bound, squares, elements = coordinates(subspace, law), 0.0, 0
    for direction in [Direction(seed, seed) for seed in range(40)]:
        step = [replace(direction, index=probe) for probe in range(bound.weights.num_elements)]
        moving = [name for name in bound.weights.tensors if any(bound.moves(d, name) for d in step)]
        squares += sum(float(bound.z(direction, name).square().sum()) for name in moving)
        elements += sum(bound.weights.tensors[name].numel() for name in moving)  # some direction of the step moves it
    assert squares / elements == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_direction_depends_neither_on_what_was_asked_before_nor_on_the_global_generator(subspace, law):
    used, fresh = coordinates(subspace, law), coordinates(subspace, law)
    before = torch.get_rng_state()
    for step in (9, 0, 4):
        for direction in (Direction(8, step), Direction(3, step)):
            for name in used.weights.tensors:
                used.z(direction, name)
    torch.rand(3)
    for name in reversed(fresh.weights.tensors):
        assert torch.equal(fresh.z(DIRECTIONS[0], name), used.z(DIRECTIONS[0], name))
    torch.set_rng_state(before)
