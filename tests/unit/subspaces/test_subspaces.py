"""Bound subspaces: chunks cover the tensor, what is kept is what is drawn, a combination is the sum of its z's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoft.errors import UserError
from zoft.noise import source as source_module
from zoft.noise.counter import squared_norm
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS, SOURCES
from zoft.subspaces import base
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights


class Model(nn.Module):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(7, 9, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(5, dtype=dtype))
        self.c = nn.Parameter(torch.zeros((), dtype=dtype))


def coordinates(law: str = "gaussian", source: str = "counter", dtype=torch.float32) -> base.BoundSubspace:
    return Full(law).bind(Weights(Model(dtype)), source)


TERMS = [(Direction(0, 3, 0), 0.5), (Direction(0, 3, 1), -2.0), (Direction(0, 3, 2), 1e-3)]


@pytest.mark.parametrize("chunk", [1, 7, 62, 63, 64, 1 << 20])
def test_chunks_cover_every_element_once(chunk, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    coords = coordinates()
    for name, size in coords.weights.sizes().items():
        ranges = list(coords.chunks(name))
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
        assert max(stop - start for start, stop in ranges) <= chunk


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("chunk", [11, 1 << 20])
@pytest.mark.parametrize("keep", [0, 70, 1 << 24])
def test_a_combination_is_the_sum_of_its_directions(law, source, chunk, keep, monkeypatch):
    if source == "torch_sequential" and law != "gaussian":
        with pytest.raises(UserError, match=f"subspace.law={law} needs noise=counter"):
            coordinates(law, source)
        return
    monkeypatch.setattr(base, "_CHUNK", chunk)
    monkeypatch.setattr(base, "_KEEP", keep)
    coords, fresh = coordinates(law, source), coordinates(law, source)
    for direction, _ in TERMS:
        coords.z(direction, "a")
    for name, tensor in coords.weights.tensors.items():
        pieces = [coords.combination(name, start, stop, TERMS) for start, stop in coords.chunks(name)]
        wanted = torch.zeros(tensor.numel())
        for direction, coefficient in TERMS:
            wanted += fresh.z(direction, name).view(-1) * coefficient
        assert torch.equal(torch.cat(pieces), wanted)


@pytest.mark.parametrize("law", LAWS)
def test_kept_directions_are_the_drawn_ones(law, monkeypatch):
    cached = coordinates(law)
    monkeypatch.setattr(base, "_KEEP", 0)
    never = coordinates(law)
    for name, tensor in cached.weights.tensors.items():
        for direction, _ in TERMS:
            monkeypatch.setattr(base, "_KEEP", 1 << 24)
            first, again = cached.z(direction, name), cached.z(direction, name)
            monkeypatch.setattr(base, "_KEEP", 0)
            assert first is again
            assert first.shape == tensor.shape
            assert torch.equal(first, never.z(direction, name))
            assert torch.equal(cached.draw(direction, name, 0, tensor.numel()), first.view(-1))
    assert not never.z_cache


def test_overwriting_a_draw_does_not_reach_what_is_kept():
    coords = coordinates()
    z = coords.z(TERMS[0][0], "a").clone()
    coords.draw(TERMS[0][0], "a", 3, 50).zero_()
    coords.combination("a", 0, 63, TERMS)
    assert torch.equal(coords.z(TERMS[0][0], "a"), z)


def test_what_is_kept_is_bounded_and_dropped_with_the_step(monkeypatch):
    monkeypatch.setattr(base, "_KEEP", 100)
    coords = coordinates()
    for direction, _ in TERMS:
        for name in coords.weights.tensors:
            coords.z(direction, name)
    assert 0 < sum(z.numel() for z in coords.z_cache.values()) <= 100
    coords.z(Direction(0, 1), "b")
    assert list(coords.z_cache) == [(Direction(0, 1), "b")]


def test_directions_of_the_same_step_of_another_seed_are_not_confused():
    coords = coordinates()
    assert not torch.equal(coords.z(Direction(0, 0), "a"), coords.z(Direction(1, 0), "a"))


def test_sphere_norms_are_computed_once_a_direction_of_a_step(monkeypatch):
    monkeypatch.setattr(base, "_KEEP", 0)
    counted = []
    real = squared_norm
    monkeypatch.setattr(source_module, "squared_norm", lambda *args: counted.append(args) or real(*args))
    coords = coordinates("sphere")
    for name, tensor in coords.weights.tensors.items():
        coords.combination(name, 0, tensor.numel(), TERMS)
    assert len(counted) == len(TERMS) * len(coords.weights.tensors)  # not once more for every tensor and chunk


def test_torch_sequential_walks_once_a_direction_of_a_step(monkeypatch):
    monkeypatch.setattr(base, "_KEEP", 0)
    coords = coordinates("gaussian", "torch_sequential")
    walks = []
    real = coords.source._record_states
    monkeypatch.setattr(coords.source, "_record_states", lambda d: walks.append(d) or real(d))
    terms = [(Direction(10 + i, 0, i), 1.0) for i in range(3)]
    for name, tensor in coords.weights.tensors.items():
        coords.combination(name, 0, tensor.numel(), terms)
    assert walks == [direction for direction, _ in terms]
    coords.z(Direction(20, 1), "b")
    assert list(coords.source._states) == [Direction(20, 1)]  # a step's states do not outlive it


def test_unknown_noise_and_law_are_refused():
    with pytest.raises(UserError, match=r"estimator.noise must be one of counter, torch_sequential, got 'white'"):
        coordinates(source="white")
    with pytest.raises(UserError, match=r"full.law must be one of"):
        Full(law="cauchy")


def test_lift_and_shape_of_the_full_space_are_the_tensors_own():
    coords = coordinates()
    assert coords.shape("a") == (7, 9)
    piece = torch.arange(5.0)
    assert list(coords.pieces("b", 2, 5)) == [(2, 5)]
    assert coords.lift(Direction(0, 0), "b", piece, 0, 0, 5) is piece
