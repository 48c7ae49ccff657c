"""Which weights each choice trains, by name, in five families."""

from __future__ import annotations

import pytest

from tests.models import EVERY, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_opt, tiny_roberta_mlm, tiny_t5
from zoft.component import components
from zoft.errors import UserError
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.trainable.adapter import Adapter
from zoft.lm.models.trainable.all import All
from zoft.lm.models.trainable.auto import Auto
from zoft.lm.models.trainable.base import block_of, is_norm_or_bias
from zoft.lm.models.trainable.last_blocks import LastBlocks
from zoft.lm.models.trainable.norms_and_biases import NormsAndBiases
from zoft.lm.models.trainable.regex import Regex


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def starting(model, *starts: str) -> set[str]:
    return {name for name in names(model) if name.startswith(starts)}


@pytest.mark.parametrize("family", EVERY)
def test_all_is_all_and_counts_tied_weights_once(family):
    model = EVERY[family]()
    model.requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    assert All().apply(model) == (total, total)
    assert trained(model) == names(model)


@pytest.mark.parametrize("family", EVERY)
def test_counts_are_those_of_the_tensors(family):
    model = EVERY[family]()
    count, total = LastBlocks(1).apply(model)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < count < total == sum(p.numel() for p in model.parameters())


LAST = {
    "llama": ("model.layers.2.", "model.norm."),
    "qwen": ("model.layers.2.", "model.norm."),
    "opt": ("model.decoder.layers.2.", "model.decoder.final_layer_norm."),
    "gpt2": ("transformer.h.2.", "transformer.ln_f."),
    "bert": ("bert.encoder.layer.2.", "classifier."),
    "roberta": ("roberta.encoder.layer.2.",),
}


@pytest.mark.parametrize("family", LAST)
def test_the_last_block_and_the_norm_after_it(family):
    model = EVERY[family]()
    LastBlocks(1).apply(model)
    assert trained(model) == starting(model, *LAST[family])


def test_two_blocks_are_one_more():
    model = tiny_llama()
    LastBlocks(2).apply(model)
    assert trained(model) == starting(model, "model.layers.1.", "model.layers.2.", "model.norm.")


def test_t5_trains_one_stack():
    model = tiny_t5()
    LastBlocks(1).apply(model)
    stack = "decoder"  # the one nearer the output
    assert {name.split(".")[0] for name in trained(model)} == {stack}
    assert starting(model, f"{stack}.block.1.") <= trained(model)
    assert not starting(model, f"{stack}.block.0.") & trained(model)


def test_more_blocks_than_there_are():
    with pytest.raises(UserError, match=r"trainable.num_blocks=4 but the model has 3 blocks"):
        LastBlocks(4).apply(tiny_llama())


def test_a_model_without_blocks():
    from torch import nn

    with pytest.raises(UserError, match="trainable=last_blocks found no numbered blocks in this model"):
        LastBlocks(1).apply(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "some", "none"),
    [
        (tiny_llama, {"model.norm.weight", "model.layers.0.input_layernorm.weight"}, "proj.weight"),
        (tiny_opt, {"model.decoder.final_layer_norm.bias", "model.decoder.layers.1.fc1.bias"}, "fc1.weight"),
        (
            tiny_gpt2,
            {"transformer.ln_f.weight", "transformer.h.1.ln_2.weight", "transformer.h.0.mlp.c_fc.bias"},
            "c_fc.weight",
        ),
        (
            tiny_bert_classifier,
            {"bert.embeddings.LayerNorm.weight", "classifier.bias", "bert.encoder.layer.1.output.LayerNorm.bias"},
            "dense.weight",
        ),
        (tiny_roberta_mlm, {"lm_head.layer_norm.weight", "lm_head.bias"}, "dense.weight"),
        (
            tiny_t5,
            {"encoder.block.0.layer.0.layer_norm.weight", "decoder.final_layer_norm.weight"},
            "SelfAttention.q.weight",
        ),
    ],
)
def test_norms_and_biases(make, some, none):
    model = make()
    NormsAndBiases().apply(model)
    chosen = trained(model)
    assert some <= chosen
    assert not [name for name in chosen if name.endswith(none)]
    dims = {name: p.dim() for name, p in model.named_parameters()}
    head = {"classifier.weight"}  # of the BERT classifier: a fresh head is trained whatever else is
    assert {name for name, dim in dims.items() if dim == 1} == chosen - head  # in these families, exactly the vectors
    assert head & dims.keys() <= chosen
    assert not [name for name in chosen if "relative_attention_bias" in name]


def test_norms_and_biases_of_the_last_block():
    model = tiny_opt()
    NormsAndBiases(num_blocks=1).apply(model)
    last = starting(model, *LAST["opt"])
    assert trained(model) == {name for name in last if is_norm_or_bias(name)}


def test_regex_searches_anywhere_and_freezes_the_rest():
    model = tiny_llama()
    Regex(pattern=r"layers\.(0|2)\..*q_proj").apply(model)
    assert trained(model) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2)}


def test_regex_that_matches_nothing_shows_names_of_the_model():
    with pytest.raises(
        UserError, match=r"trainable=regex selects no weights.*names such as model\.embed_tokens\.weight"
    ):
        Regex(pattern="nowhere").apply(tiny_llama())


@pytest.mark.parametrize(("pattern", "message"), [("", "regex.pattern must be"), ("(", "is not a regular expression")])
def test_a_broken_expression_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        Regex(pattern=pattern)


def test_adapter_and_auto_take_what_peft_trains():
    model = Lora().wrap(tiny_llama(), 0)
    lora = {name for name in names(model) if "lora_" in name}
    assert lora
    for choice in (Adapter(), Auto()):
        choice.apply(model)
        assert trained(model) == lora


@pytest.mark.parametrize(
    "choice", [All(), NormsAndBiases(), LastBlocks(1), Regex(pattern="norm")], ids=lambda c: c.name()
)
def test_what_would_not_be_saved_with_the_adapter_is_refused(choice):
    model = Lora().wrap(tiny_llama(), 0)
    before = trained(model)
    with pytest.raises(UserError, match=r"only the adapter is saved: use trainable=adapter"):
        choice.apply(model)
    assert trained(model) == before
    Regex(pattern="lora_B").apply(model)  # a part of the adapter is fine
    assert trained(model) < before


def test_adapter_without_one_is_refused_instead_of_training_everything():
    model = tiny_llama()
    with pytest.raises(UserError, match=r"trainable=adapter needs an adapter: choose peft=lora"):
        Adapter().apply(model)


def test_auto_on_a_plain_model_is_everything():
    model = tiny_llama()
    Auto().apply(model)
    assert trained(model) == names(model)


def test_a_choice_made_twice_is_the_last_one():
    model = tiny_llama()
    Regex(pattern="q_proj").apply(model)
    Regex(pattern="k_proj").apply(model)
    assert trained(model) == {name for name in names(model) if "k_proj" in name}


def test_block_of():
    assert block_of("transformer.h.11.ln_1.weight") == 11
    assert block_of("bert.encoder.layer.3.output.dense.weight") == 3
    assert block_of("encoder.block.1.layer.0.SelfAttention.q.weight") == 1
    assert block_of("layers.7.weight") == 7
    assert block_of("model.embed_tokens.weight") is None


def test_discovery_finds_the_choices_of_this_page():
    assert {"all", "auto", "adapter", "last_blocks", "norms_and_biases", "regex"} <= set(components("trainable"))
