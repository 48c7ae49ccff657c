"""Feed-forward parts of blocks: the gradients inside are exact, and one response serves all where it may."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.contract.test_nodes import EXACT, gradients, lora, only, queries
from zoft.engines.nodes import NodeSession
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes as Estimator
from zoft.noise.direction import Direction
from zoft.optimizers.whiten import Whiten
from zoft.step.method import Method
from zoft.subspaces.nodes import STREAM
from zoft.subspaces.nodes import Nodes as Subspace

MLP = ("mlp",)
PROBES = Estimator(first=3, eps=1e-2)


def space_of(model, feedback="hidden", **fields):
    return queries(model, feedback, **fields).session.coordinates


@pytest.mark.parametrize(
    "family", ["tiny_llama", "tiny_qwen", "tiny_gpt2", "tiny_gemma", "tiny_gemma2", "tiny_cohere", "tiny_opt"]
)
def test_a_blocks_feed_forward_part_is_perturbed_as_a_whole_and_its_layers_are_not(family):
    space = space_of(only(getattr(models, family)(), *MLP, "fc"))
    assert set(space.perturbed()) == set(space.parts)
    assert set(space.inside) == set(space.nodes)
    assert len(space.parts) == len(set(space.inside.values())) >= 2


@pytest.mark.parametrize("depths", [(2, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize("family", ["Pegasus", "Marian"])
def test_parts_of_a_decoder_are_found_behind_an_encoder_of_any_depth(family, depths):
    model = only(models.tiny_translator(family, *depths), "decoder.layers")
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "hidden", layers="mlp")
    assert set(ask.session.coordinates.parts) == {f"model.decoder.layers.{i}.fc1" for i in range(depths[1])}
    exact = queries(model, "loss", layers="mlp", positions="all")(batch, Direction(0, 0), EXACT).factors
    wanted = gradients(model, batch)
    for name, one in exact.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    assert len(exact) == 2 * depths[1]
    learnt = ask(batch, Direction(0, 0), Estimator(first=64, eps=1e-2)).factors
    last = f"model.decoder.layers.{depths[1] - 1}.fc2.weight"
    assert float(torch.nn.functional.cosine_similarity(learnt[last].e, exact[last].e, dim=1).mean()) > 0.8


@pytest.mark.parametrize("family", ["tiny_bert_classifier", "tiny_bloom"])
def test_layers_without_such_a_part_move_their_own_outputs(family):
    """BERT's are two modules, one of which adds what it is given; Bloom's is handed a residual."""
    model = only(getattr(models, family)(), "fc1", "fc2", "dense", "attn", "attention", "classifier")
    space = space_of(model, layers="linear")
    assert not space.parts
    assert set(space.perturbed()) == set(space.nodes)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("tiny_llama", ["gate_proj", "up_proj", "down_proj"]),
        ("tiny_llama", ["gate_proj", "q_proj"]),
        ("tiny_opt", ["fc1", "fc2"]),
    ],
)
def test_gradients_of_an_adapter_inside_a_part_are_autograds(family, targets):
    model = lora(getattr(models, family)(), targets)
    batch = models.batch_for(model, rows=3, length=7)
    ask = queries(model, "loss", positions="all")
    assert ask.session.coordinates.parts
    factors, wanted = ask(batch, Direction(0, 0), EXACT).factors, gradients(model, batch)
    assert set(factors) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(factors[name].dense(), gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "is_shared"),
    [
        ("tiny_llama", True), ("tiny_qwen", True), ("tiny_gpt2", True), ("tiny_gemma", True), ("tiny_cohere", True),
        ("tiny_gemma2", True), ("tiny_olmo2", True), ("tiny_opt", True), ("tiny_granite", False),
    ],
)  # fmt: skip
def test_parts_share_a_response_where_blocks_add_them_to_the_residual_stream(family, is_shared):
    """Gemma 2 normalises what a part gives before it is added, which counts as the part's; Granite scales it."""
    model = only(getattr(models, family)(), *MLP, "fc")
    ask = queries(model)
    ask(models.batch_for(model, rows=4, length=7), Direction(0, 0), PROBES)
    space = ask.session.coordinates
    assert space.shared is is_shared
    assert set(space.response) == ({STREAM} if is_shared else set(space.parts))


def test_two_matrices_of_a_block_are_a_part_with_the_activation_between_them():
    """Of OPT: fc1, activation, fc2."""
    model = only(models.tiny_opt(), "fc")
    batch = models.batch_for(model, rows=3, length=7)
    factors = queries(model, "loss", positions="all")(batch, Direction(0, 0), EXACT).factors
    wanted = gradients(model, batch)
    for name, one in factors.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-4, atol=1e-7)
    assert len(factors) == 6


@pytest.mark.parametrize(("family", "later"), [("tiny_gemma2", "post_feedforward_layernorm"), ("tiny_opt", "fc2")])
def test_a_module_that_is_given_something_else_than_the_one_before_it_gave_is_noticed(family, later):
    """Its name promises that it stands behind it; what it is given shows whether it does."""
    model = only(getattr(models, family)(), *MLP, "fc")
    for name, module in model.named_modules():
        if name.endswith(later):
            module.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    ask = queries(model)
    ask(models.batch_for(model, rows=4, length=7), Direction(0, 0), PROBES)
    assert not ask.session.coordinates.shared


def test_the_shared_response_is_the_mean_of_the_blocks_own():
    model = only(models.tiny_llama(), *MLP)
    batch = models.batch_for(model, rows=4, length=7)
    asked = {probed: queries(model, probed=probed) for probed in ("parts", "shared")}
    for ask in asked.values():
        ask(batch, Direction(0, 0), PROBES)
    responses = asked["parts"].session.coordinates.response
    assert len(responses) == 3
    torch.testing.assert_close(
        asked["shared"].session.coordinates.response[STREAM], torch.stack(list(responses.values())).mean(0)
    )


def test_further_positions_have_a_response_for_each_block():
    """What an earlier position does to the loss goes through the attention of the blocks above, unlike in each."""
    model = only(models.tiny_llama(), *MLP)
    ask = queries(model, positions="last", num_positions=2)
    ask(models.batch_for(model, rows=4, length=7), Direction(0, 0), PROBES)
    assert STREAM not in ask.session.coordinates.response


def test_each_layer_can_be_asked_for():
    space = space_of(only(models.tiny_llama(), *MLP), probed="layers")
    assert not space.parts
    assert set(space.perturbed()) == set(space.nodes)


@pytest.mark.parametrize("probed", ["layers", "parts", "shared"])
def test_a_response_goes_on_as_it_was_learnt(probed):
    """A run of an earlier version has learnt layers, whatever is the default now."""
    model = only(models.tiny_llama(), *MLP)
    batch = models.batch_for(model, rows=4, length=7)
    first = queries(model, probed=probed)
    first(batch, Direction(0, 0), PROBES)
    second = queries(model)
    second.session.coordinates.load_state_dict(first.session.coordinates.state_dict())
    factors = [ask(batch, Direction(0, 1), PROBES).factors for ask in (first, second)]
    assert factors[0].keys() == factors[1].keys() == set(second.session.coordinates.nodes)
    for name, one in factors[0].items():
        assert torch.equal(one.e, factors[1][name].e)


def test_a_part_that_is_asked_for_and_not_there_is_refused():
    with pytest.raises(UserError, match="probed=layers"):
        space_of(models.tiny_bloom(), probed="shared")
    with pytest.raises(UserError, match="probed must be one of auto, layers, parts, shared"):
        space_of(models.tiny_llama(), probed="blocks")


def test_a_part_that_mixes_positions_is_refused():
    """Its rows alone do not give what they give in the whole model."""
    model = only(models.tiny_llama(), *MLP)
    part = model.model.layers[1].mlp
    gate = part.gate_proj.forward
    part.gate_proj.forward = lambda x: gate(x + x.mean(1, keepdim=True))
    up = type(part).forward
    part.forward = lambda x: up(part, x + x.cumsum(1))
    with pytest.raises(UserError, match=r"layers\.1\.mlp position by position.*probed=layers"):
        queries(model)(models.batch_for(model, rows=4, length=7), Direction(0, 0), PROBES)


@pytest.mark.parametrize(
    "family", ["tiny_llama", "tiny_gpt2", "tiny_gemma", "tiny_gemma2", "tiny_olmo2", "tiny_cohere", "tiny_opt"]
)
def test_of_the_last_block_the_identity_is_the_gradient_itself(family):
    """Nothing but norm and head lies behind it: e = dL/dh, without a probe, is what backpropagation finds."""
    model = getattr(models, family)()
    last = len(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))) - 1
    model = only(model, f"s.{last}.mlp", f"h.{last}.mlp", f"s.{last}.fc")
    batch = models.batch_for(model, rows=4, length=7)
    estimate = queries(model, "hidden")(batch, Direction(0, 0), Estimator(response="identity"))
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT)
    assert estimate.num_queries == 1
    assert estimate.factors.keys() == exact.factors.keys() != set()
    for name, one in exact.factors.items():
        torch.testing.assert_close(estimate.factors[name].e, one.e, rtol=1e-4, atol=1e-7)
        assert torch.equal(estimate.factors[name].x, one.x)
        assert not estimate.factors[name].noisy


def test_further_down_the_identity_points_the_way_of_the_gradient():
    model = only(models.tiny_llama(), *MLP)
    batch = models.batch_for(model, rows=4, length=7)
    factors = queries(model, "hidden")(batch, Direction(0, 0), Estimator(response="identity")).factors
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT).factors
    for name, one in exact.items():
        cosine = torch.nn.functional.cosine_similarity(factors[name].e.flatten(), one.e.flatten(), dim=0)
        assert float(cosine) > 0.5, name


@pytest.mark.parametrize("given", [{"directions": "iid"}, {"probed": "shared"}])
def test_the_identity_refuses_settings_of_what_is_probed(given):
    with pytest.raises(UserError, match=f"makes no probes: leave out subspace.{next(iter(given))}"):
        Method(Subspace(**given), Estimator(response="identity"), Method.of().weighting, Whiten())


def test_what_layers_see_inside_a_part_is_compared_once_and_not_in_every_step(monkeypatch):
    model = only(models.tiny_llama(), *MLP)
    batch, ask = models.batch_for(model, rows=4, length=7), queries(model)
    wanted = []
    inside = NodeSession.inside
    monkeypatch.setattr(
        NodeSession, "inside", lambda *args, looking: wanted.append(looking) or inside(*args, looking=looking)
    )
    for step in range(2):
        ask(batch, Direction(0, step), Estimator(response="identity"))
    assert wanted == [True] * 3 + [False] * 3


@pytest.mark.parametrize("given", [{"first": 8}, {"every": 2}, {"eps": 0.5}, {"num_directions": 2}])
def test_the_identity_refuses_settings_of_probes(given):
    with pytest.raises(UserError, match=f"makes no probes: leave out {next(iter(given))}"):
        Estimator(response="identity", **given)
    with pytest.raises(UserError, match="leave out feedback"):
        Estimator(response="identity", feedback="scores")
