"""Blocks of layers: found by name, each once a pass, one for all directions of a step, and the full space's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.source import LAWS
from zoft.subspaces.blocks import Blocks, BoundBlock, layer_of
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights


def bound(model: nn.Module | None = None, **fields) -> BoundBlock:
    return Blocks(**fields).bind(Weights(model or six()))


def six() -> nn.Module:
    """Six layers, and a head outside of them."""
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 3) for _ in range(6)), "head": nn.Linear(3, 3)})


def moving(coordinates: BoundBlock, step: int, seed: int = 0) -> set[str]:
    """The layers that move, by their last part; `head` is what is in none."""
    names = [name for name in coordinates.weights.tensors if coordinates.moves(Direction(seed, step), name)]
    return {(layer_of(name) or "head").split(".")[-1] for name in names}


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.decoder.layers.7.self_attn.q_proj.weight", "model.decoder.layers.7"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11"),
        ("decoder.block.3.layer.1.layer_norm.weight", "decoder.block.3"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "base_model.model.model.layers.0"),
        ("model.layers.3.mlp.experts.17.w1.weight", "model.layers.3"),
        ("0.weight", "0"),
        ("model.embed_tokens.weight", None),
        ("fc1.weight", None),
        ("weight", None),
    ],
)
def test_a_layer_is_the_outermost_number_of_a_name(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("make", "layers"), [(tiny_opt, 3), (tiny_llama, 3), (tiny_gpt2, 3), (tiny_bert_classifier, 3), (tiny_t5, 4)]
)
def test_the_layers_of_a_model_and_one_block_of_what_is_outside(make, layers):
    coordinates = bound(make())
    assert coordinates.num_blocks == layers + 1
    blocks = [
        {name for name in coordinates.weights.tensors if coordinates.moves(Direction(0, step), name)}
        for step in range(layers + 1)
    ]
    assert set().union(*blocks) == set(coordinates.weights.tensors)
    assert sum(len(block) for block in blocks) == len(coordinates.weights.tensors)
    assert any("embed" in name or "wte" in name or "shared" in name for name in blocks[-1])


def test_layers_without_anything_outside():
    coordinates = bound(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))))
    assert coordinates.num_blocks == 3
    assert [moving(coordinates, step) for step in range(4)] == [{"0"}, {"1"}, {"2"}, {"0"}]


def test_only_what_is_trained_counts():
    model = six()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name or "layers.5" in name)
    assert [moving(bound(model), step) for step in range(3)] == [{"2"}, {"5"}, {"2"}]


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match=r"no trained tensor has a layer's number.*such as weight.*use subspace=full"):
        bound(nn.Linear(2, 2))


# -------------------------------------------------------------------------------------------------------------- blocks


def test_cyclic_order_takes_neighbours_in_the_models_order():
    coordinates = bound(block_size=4, interval=2)
    passed = [{"0", "1", "2", "3"}] * 2 + [{"4", "5"}] * 2 + [{"head"}] * 2
    assert coordinates.num_blocks == 3
    assert [moving(coordinates, step) for step in range(12)] == passed * 2


@pytest.mark.parametrize("block_size", [1, 2, 4, 100])
def test_random_order_deals_every_layer_once_a_pass(block_size):
    coordinates = bound(order="random", block_size=block_size)
    passes = []
    for start in range(0, 20 * coordinates.num_blocks, coordinates.num_blocks):
        blocks = [moving(coordinates, step) for step in range(start, start + coordinates.num_blocks)]
        assert sorted(layer for block in blocks for layer in block) == ["0", "1", "2", "3", "4", "5", "head"]
        assert blocks[-1] == {"head"}
        passes.append(blocks)
    different = {str([sorted(block) for block in blocks]) for blocks in passes}
    assert len(different) > 5 if block_size < 6 else len(different) == 1


def test_random_order_reaches_every_layer_first_equally_often():
    coordinates = bound(order="random")
    first = [moving(coordinates, step).pop() for step in range(0, 7 * 1200, 7)]
    assert all(abs(first.count(layer) - 200) < 4.5 * (1200 * 5 / 36) ** 0.5 for layer in "012345")


def test_the_block_depends_on_seed_and_step_alone():
    one, other = bound(order="random"), bound(order="random")
    torch.manual_seed(1)
    steps = list(range(40))
    assert [moving(one, step) for step in steps] == [moving(other, step) for step in steps[::-1]][::-1]
    assert [moving(one, step, seed=1) for step in steps] != [moving(one, step) for step in steps]
    for step in steps:
        for name in one.weights.tensors:
            assert len({one.moves(Direction(0, step, probe), name) for probe in range(5)}) == 1


def test_directions_of_several_seeds_are_not_summed():
    with pytest.raises(UserError, match=r"moves one block along all directions.*subspace=full with direction_seeds"):
        bound().combination("layers.0.weight", 0, 9, [(Direction(1, 0), 1.0), (Direction(2, 0, 1), 1.0)])


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("law", LAWS)
def test_the_numbers_are_those_of_the_full_space(law):
    model = six()
    blocks, full = bound(model, law=law), Full(law).bind(Weights(model))
    for step in range(7):
        direction = Direction(3, step, 1)
        for name, tensor in model.named_parameters():
            if blocks.moves(direction, name):
                wanted = full.z(direction, name)
                assert torch.equal(blocks.draw(direction, name, 1, 3), full.draw(direction, name, 1, 3))
            else:
                wanted = torch.zeros_like(tensor)
            assert torch.equal(blocks.z(direction, name), wanted)


@pytest.mark.parametrize("keeps", [True, False])
def test_what_does_not_move_is_not_drawn_nor_kept(keeps, monkeypatch):
    coordinates = bound()
    coordinates.keeps = keeps
    drawn, source = [], coordinates.source
    for way in ("draw", "add_", "perturb"):
        real = getattr(source, way)
        monkeypatch.setattr(source, way, lambda *args, real=real: drawn.append(args) or real(*args))
    direction = Direction(0, 2)
    for name, tensor in coordinates.weights.tensors.items():
        coordinates.z(direction, name)
        coordinates.draw(direction, name, 0, 2)
        coordinates.combination(name, 0, 2, [(direction, 1.0), (Direction(0, 2, 1), 1.0)])
        coordinates.add_(torch.zeros(2), direction, name, 0, 1.0)
        coordinates.perturb(direction, name, 0, [1.0], [torch.empty(tensor.numel())])
    moved = {"layers.2.weight", "layers.2.bias"}
    assert {value for args in drawn for value in args if isinstance(value, str)} == moved
    assert {name for _, name in coordinates.z_cache} == (moved if keeps else set())


def test_a_weight_that_does_not_move_is_handed_over_to_the_bit():
    model = six()
    model["layers"][1].weight.data.fill_(-0.0)  # which adding zero would turn into +0
    coordinates = bound(model)
    out = torch.empty(9)
    coordinates.perturb(Direction(0, 0), "layers.1.weight", 0, [1.0], [out])
    assert torch.equal(torch.signbit(out), torch.ones(9, dtype=torch.bool))
    rows = coordinates.perturbed_rows(Direction(0, 0), "layers.1.weight", torch.tensor([2, 0]), 1.0)
    assert torch.equal(torch.signbit(rows), torch.ones(2, 3, dtype=torch.bool))


def test_refusals_say_what_works():
    with pytest.raises(UserError, match=r"noise=torch_sequential.*subspace=blocks needs estimator.noise=counter"):
        Blocks().bind(Weights(six()), "torch_sequential")
    with pytest.raises(UserError, match=r"blocks.order must be one of cyclic, random, got 'sorted'"):
        Blocks(order="sorted")
    with pytest.raises(UserError, match=r"blocks.block_size must be at least 1, got 0"):
        Blocks(block_size=0)
    with pytest.raises(UserError, match=r"blocks.interval must be at least 1, got 0"):
        Blocks(interval=0)
