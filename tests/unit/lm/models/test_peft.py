"""Adapters through peft: what they wrap, how they start, and the global random state they leave alone."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from tests import models
from tests.models import CAUSAL, EVERY, batch_for, tiny_bert_classifier, tiny_llama, tiny_roberta_mlm, tiny_t5
from zoft.component import components, create
from zoft.errors import UserError
from zoft.lm.models.names import portable_name, without_asking
from zoft.lm.models.peft.base import task_type_of
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.peft.none import NoAdapter
from zoft.lm.models.peft.prefix import Prefix, _real_keys_and_values
from zoft.lm.models.peft.prompt import Prompt

ADAPTERS = [name for name in components("peft") if name != "none"]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_none_is_the_model_itself():
    model = tiny_llama()
    assert NoAdapter().wrap(model, 0) is model
    assert len(trained(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen", "bert", "t5"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_adapter_alone_is_trained_and_the_model_runs(adapter, family):
    model = EVERY[family]()
    batch, original = batch_for(model), set(map(id, model.parameters()))
    wrapped = create("peft", adapter, adapter).wrap(model, 0).eval()
    assert trained(wrapped)
    fresh = {name for name, p in trained(wrapped).items() if id(p) not in original}
    heads = {name for name in trained(wrapped) if "classifier" in name}  # peft trains a new head as well
    assert set(trained(wrapped)) == fresh | heads
    with torch.no_grad():
        assert bool(torch.isfinite(wrapped(**batch).loss))


def test_lora_starts_as_the_model_is():
    model, batch = tiny_llama(), batch_for(tiny_llama())
    with torch.no_grad():
        before = model(**batch).loss
        after = Lora().wrap(model, 0).eval()(**batch).loss
    assert torch.equal(before, after)


def test_what_peft_refuses_is_one_sentence():
    with pytest.raises(UserError, match="peft=lora does not fit LlamaForCausalLM: "):
        Lora(on="feed_forward", layers_to_transform=[1]).wrap(tiny_llama(), 0)


def test_lora_fields_reach_the_weights():
    wrapped = Lora(r=3, lora_alpha=12, target_modules=["k_proj"], layers_to_transform=[1]).wrap(tiny_llama(), 0)
    shapes = {tuple(p.shape) for p in trained(wrapped).values()}
    assert shapes == {(3, 16), (8, 3)}
    assert all(".layers.1." in name and "k_proj" in name for name in trained(wrapped))
    (config,) = wrapped.peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12, 0.0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_seed_decides_the_start_and_nothing_global_moves(adapter):
    def start(seed: int) -> torch.Tensor:
        return torch.cat(
            [p.detach().view(-1) for p in trained(create("peft", adapter, adapter).wrap(tiny_llama(), seed)).values()]
        )

    torch.manual_seed(99)
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    first = start(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    torch.manual_seed(100)
    assert torch.equal(start(1), first)
    assert not torch.equal(start(2), first)


# ----------------------------------------------------------------------------------------- a prefix of real activations


def tokens_of_seed(model, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_prefix_starts_from_the_keys_and_values_of_real_tokens(family):
    model = CAUSAL[family]()
    ids = tokens_of_seed(model, 4, 7)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    wrapped = Prefix(num_virtual_tokens=4).wrap(model, 7)
    prefix = wrapped.get_prompt(batch_size=1)
    for layer, real in enumerate(cache.layers):
        held = prefix.layers[layer] if hasattr(prefix, "layers") else prefix[layer]
        keys, values = (held.keys, held.values) if hasattr(held, "keys") else (held[0], held[1])
        torch.testing.assert_close(keys, real.keys, rtol=0, atol=0)
        torch.testing.assert_close(values, real.values, rtol=0, atol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_model_with_its_prefix_reads_on_as_if_behind_those_tokens(family):
    model = CAUSAL[family]()
    batch = batch_for(model, rows=2, length=5)
    ids = tokens_of_seed(model, 4, 7)
    whole = torch.cat((ids.expand(2, -1), batch["input_ids"]), dim=1)
    with torch.no_grad():
        wanted = model(input_ids=whole).logits[:, 4:]
        wrapped = Prefix(num_virtual_tokens=4).wrap(model, 7).eval()
        logits = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_activations_are_those_without_dropout():
    training = EVERY["gpt2"]().train()
    assert training.config.attn_pdrop > 0
    one, two = (next(iter(trained(Prefix().wrap(m, 3)).values())) for m in (training, EVERY["gpt2"]()))
    assert torch.equal(one, two)


def test_init_random_is_another_start():
    real, noise = (Prefix(init=init).wrap(tiny_llama(), 3) for init in ("activations", "random"))
    one, two = (next(iter(trained(m).values())) for m in (real, noise))
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_init_leaves_the_mode_of_the_model():
    for training in (True, False):
        model = tiny_llama().train(training)
        Prefix().wrap(model, 0)
        assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_roberta_mlm, tiny_t5])
def test_models_without_a_decoder_cache_start_from_noise(make):
    assert _real_keys_and_values(make(), 3, 0) is None


# ------------------------------------------------------------------------------------------------------------- refusals


def test_task_types():
    assert task_type_of(tiny_llama()) == "CAUSAL_LM"
    assert task_type_of(EVERY["gpt2"]()) == "CAUSAL_LM"
    assert task_type_of(tiny_bert_classifier()) == "SEQ_CLS"
    assert task_type_of(tiny_t5()) == "SEQ_2_SEQ_LM"
    assert task_type_of(tiny_roberta_mlm()) == "FEATURE_EXTRACTION"


def test_bad_values_name_their_field():
    with pytest.raises(UserError, match=r"lora.r must be at least 1, got 0"):
        Lora(r=0)
    with pytest.raises(UserError, match=r"prefix.num_virtual_tokens must be at least 1"):
        Prefix(num_virtual_tokens=0)
    with pytest.raises(UserError, match=r"prefix.init must be activations or random, got 'zeros'"):
        Prefix(init="zeros")
    with pytest.raises(UserError, match=r"prompt.num_virtual_tokens must be at least 1"):
        Prompt(num_virtual_tokens=0)


def test_lora_on_modules_that_are_not_there_is_a_sentence():
    with pytest.raises(UserError, match=r"nowhere"):
        Lora(target_modules=["nowhere"]).wrap(tiny_llama(), 0)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen", "tiny_opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_fault_1_a_prompt_is_as_far_from_a_padded_row_as_from_a_row_alone(family, side):
    """peft numbers positions over the padding between prompt and text."""
    model = Prompt(num_virtual_tokens=3).wrap(getattr(models, family)(), 0).eval()
    ids = torch.arange(4, 10).view(1, 6)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    parts = [(pad, torch.zeros_like(pad)), (ids, torch.ones_like(ids))]
    row, mask = (torch.cat(columns, 1) for columns in zip(*(parts if side == "left" else parts[::-1]), strict=True))
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 3:]
        padded = model(input_ids=row, attention_mask=mask).logits[0, 3:]
    unpadded = padded[4:] if side == "left" else padded[:6]
    torch.testing.assert_close(unpadded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen", "tiny_opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["peft", "mezo"])
def test_fault_1_a_prefix_is_as_far_from_a_padded_row_as_from_a_row_alone(family, side, layout):
    model = Prefix(num_virtual_tokens=3, layout=layout).wrap(getattr(models, family)(), 0).eval()
    ids = torch.arange(4, 10).view(1, 6)
    pad = torch.zeros(1, 4, dtype=torch.int64)
    parts = [(pad, torch.zeros_like(pad)), (ids, torch.ones_like(ids))]
    row, mask = (torch.cat(columns, 1) for columns in zip(*(parts if side == "left" else parts[::-1]), strict=True))
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        padded = model(input_ids=row, attention_mask=mask).logits[0]
        written = model.generate(input_ids=row, attention_mask=mask, max_new_tokens=3, do_sample=False)[0, 10:]
        so_far = ids
        for _ in range(3):
            logits = model(input_ids=so_far, attention_mask=torch.ones_like(so_far)).logits
            so_far = torch.cat((so_far, logits[:, -1:].argmax(-1)), 1)
    unpadded = padded[4:] if side == "left" else padded[:6]
    torch.testing.assert_close(unpadded, alone, rtol=1e-5, atol=1e-5)
    assert side == "right" or written.tolist() == so_far[0, 6 : 6 + len(written)].tolist()


def test_mezos_prefix_is_a_parameter_for_keys_and_one_for_values_of_each_layer(tmp_path):
    """And its text begins at position 0, in training, where it is loaded again, and beside plain peft's layout."""
    from zoft.lm.models.peft import load_adapter

    model, ids = tiny_llama(), torch.arange(4, 10).view(1, 6)
    wrapped = Prefix(num_virtual_tokens=3, layout="mezo").wrap(model, 0).eval()
    assert [name.rpartition("default.")[2] for name in trained(wrapped)] == [
        f"layers.{layer}.prefix_{kind}" for layer in range(3) for kind in ("keys", "values")
    ]
    with torch.no_grad():
        logits = wrapped(input_ids=ids).logits
        keys = wrapped.get_prompt(batch_size=1)
        plain = tiny_llama()(input_ids=ids, past_key_values=keys, position_ids=torch.arange(6).view(1, 6)).logits
        assert torch.equal(logits, plain)
        wrapped.save_pretrained(tmp_path)
        assert torch.equal(load_adapter(tiny_llama(), tmp_path)(input_ids=ids).logits, logits)
        for parameter in trained(wrapped).values():
            parameter.zero_()
        wrapped.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert torch.equal(wrapped(input_ids=ids).logits, logits)
        assert not torch.allclose(Prefix(num_virtual_tokens=3).wrap(tiny_llama(), 0)(input_ids=ids).logits, logits)


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_t5])
def test_mezos_prefix_is_for_causal_models(make):
    with pytest.raises(UserError, match=r"peft.layout=mezo has the text begin at position 0"):
        Prefix(layout="mezo").wrap(make(), 0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_fault_13_an_adapter_names_the_revision_of_its_base(adapter):
    wrapped = create("peft", adapter, adapter).wrap(tiny_llama(), 0, "v1")
    assert wrapped.peft_config["default"].revision == "v1"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, bytes(range(256)), b"7"])
def test_fault_25_a_damaged_config_of_an_adapter_is_a_sentence(content, tmp_path):
    from zoft.evaluation.evaluate import _base_of
    from zoft.lm.models.peft import load_adapter
    from zoft.lm.models.peft._load import base_of

    (tmp_path / "adapter_config.json").write_bytes(content)
    for read in (base_of, lambda folder: load_adapter(tiny_llama(), folder), lambda folder: _base_of(folder, "gone")):
        with pytest.raises(UserError, match=r"adapter_config\.json (cannot be read|is no adapter's config)"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"{}", b"", b"\0" * 100], ids=["brace", "empty", "zeros"])
def test_fault_25_damaged_files_of_an_adapter_are_a_sentence(name, content, tmp_path):
    from zoft.lm.models.peft import load_adapter

    Lora().wrap(tiny_llama(), 0).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be (loaded|read)"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("family", "inside", "number"),
    [
        ("llama", "mlp.", 3), ("gpt2", "mlp.", 2), ("opt", "fc", 2), ("qwen", "mlp.", 3), ("bert", "dense", 2),
        ("t5", "DenseReluDense", 2),
    ],
)  # fmt: skip
def test_lora_on_the_feed_forward_part_of_every_block(family, inside, number):
    """And on nothing of attention, whose c_proj and output.dense have the same last names."""
    wrapped = Lora(on="feed_forward").wrap(EVERY[family](), 0)
    adapted = {name.partition(".lora_")[0] for name in trained(wrapped) if ".lora_" in name}
    assert all(inside in name and "attention" not in name and "attn" not in name for name in adapted)
    assert len(adapted) >= 2 * number  # of two blocks or more
    assert wrapped.eval()(**batch_for(EVERY[family]())).loss.isfinite()


def test_lora_is_told_once_where_it_goes():
    with pytest.raises(UserError, match="on must be auto with target_modules"):
        Lora(on="feed_forward", target_modules=["q_proj"])
    with pytest.raises(UserError, match="on must be one of auto, peft, feed_forward"):
        Lora(on="mlp")
    with pytest.raises(UserError, match=r"finds no matrix in the blocks .*peft.on=peft"):
        Lora(on="feed_forward").wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), 0)


def test_an_adapter_of_the_demo_base_is_saved_without_asking_the_hub(tmp_path, monkeypatch):
    """peft looks there whether the vocabulary has grown; the demo contacts no hub, and offline it was a warning."""
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *names, **_: asked.append(names))
    wrapped = Lora().wrap(tiny_llama(), 0)
    assert without_asking(wrapped) == without_asking(tiny_llama()) == {}
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = portable_name("zoft:smollm2-135m-instruct")
    wrapped.save_pretrained(tmp_path, **without_asking(wrapped))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not asked
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = "gpt2"
    monkeypatch.setattr("zoft.lm.models.names.out_of_reach", lambda: "")
    assert without_asking(wrapped) == {}  # peft may ask
    monkeypatch.setattr("zoft.lm.models.names.out_of_reach", lambda: "nothing answers")
    wrapped.save_pretrained(tmp_path, **without_asking(wrapped))
    assert not asked
