"""Peak memory as the kernel counts it, and the estimate for backpropagation by hand-counted numbers."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest

from zoft.report import memory
from zoft.report.backprop import ModelShape, backprop_estimate_mb, backprop_parts_mb, model_shape
from zoft.report.memory import PeakMemory

MB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters are Linux's")
def test_the_peak_is_seen_after_it_is_gone_and_reset() -> None:
    peak = PeakMemory()
    peak.reset()
    before = peak.peak_mb()
    with mmap.mmap(-1, 64 * MB) as block:  # given back to the system at once, unlike what malloc holds
        for page in range(0, 64 * MB, mmap.PAGESIZE):
            block[page] = 1
    assert peak.peak_mb() >= before + 60 > peak.current_mb()
    peak.reset()
    if peak.resettable:
        assert peak.peak_mb() < before + 30


def test_without_proc_the_process_peak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", "/no/such/file")
    monkeypatch.setattr(memory, "_CLEAR", "/no/such/file")
    peak = PeakMemory()
    peak.reset()
    assert not peak.resettable
    assert peak.peak_mb() == peak.current_mb() > 1


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1 / MB), ("linux", 1 / 1024)])
def test_rusage_has_another_unit_on_macos(monkeypatch: pytest.MonkeyPatch, platform: str, unit: float) -> None:
    import resource

    raw = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(sys, "platform", platform)
    assert memory._rusage_mb() == pytest.approx(raw * unit, rel=0.2)


def test_the_estimate_is_the_papers_formula() -> None:
    shape = ModelShape(
        num_params=1000 * MB, num_trainable=1000 * MB, num_layers=12, hidden=1024, num_heads=16, vocab=50 * 1024,
        weight_bytes=2,
    )  # fmt: skip
    parts = backprop_parts_mb(shape, batch=4, seq=1024)
    # 4 s b h = 4 MiB of hidden states; 5 a s / h = 80
    assert parts == {
        "weights": 2000, "gradients": 2000, "optimizer": 12000, "activations": 12 * 4 * (34 + 80), "logits": 4 * 4 * 50,
    }  # fmt: skip
    assert backprop_estimate_mb(shape, batch=4, seq=1024) == sum(parts.values())


def test_fused_attention_float32_and_few_trainable_weights() -> None:
    shape = ModelShape(
        MB, 1024, num_layers=1, hidden=1024, num_heads=16, vocab=0, weight_bytes=4, eager_attention=False
    )
    parts = backprop_parts_mb(shape, batch=1, seq=1024)
    assert parts == {"weights": 4, "gradients": 4 / 1024, "optimizer": 8 / 1024, "activations": 2 * 34, "logits": 0}


def tiny(kind: str) -> Any:
    import transformers as hf

    if kind == "causal":
        config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=16)
        return hf.GPT2LMHeadModel(config)
    if kind == "classifier":
        bert = hf.BertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=64
        )
        return hf.BertForSequenceClassification(bert)
    t5 = hf.T5Config(d_model=32, num_layers=1, num_decoder_layers=2, num_heads=4, d_ff=64, vocab_size=64, d_kv=8)
    return hf.T5ForConditionalGeneration(t5)


@pytest.mark.parametrize(("kind", "vocab"), [("causal", 64), ("classifier", 0), ("seq2seq", 64)])
def test_a_models_shape_is_read_from_its_config(kind: str, vocab: int) -> None:
    model = tiny(kind)
    shape = model_shape(model)
    assert shape is not None
    assert (shape.num_layers, shape.hidden, shape.num_heads, shape.vocab, shape.weight_bytes) == (3, 32, 4, vocab, 4)
    assert shape.num_params == shape.num_trainable == sum(p.numel() for p in model.parameters())
    half = model_shape(model.bfloat16(), num_trainable=7)
    assert half is not None
    assert (half.weight_bytes, half.num_trainable) == (2, 7)


def test_a_model_that_does_not_say_has_no_shape() -> None:
    import torch
    from transformers import PretrainedConfig

    model = torch.nn.Linear(2, 2)
    assert model_shape(model) is None
    model.config = PretrainedConfig()
    assert model_shape(model) is None


@pytest.mark.parametrize(
    ("trained", "below"), [("lm_head", 0), ("h.2.", 2), ("h.1.attn", 1), ("wte", 0), ("wpe", 0), ("ln_f", 3), ("", 0)]
)
def test_a_backward_pass_does_not_come_to_blocks_below_what_is_trained(trained: str, below: int) -> None:
    from zoft.engines._prefix import num_below

    model = tiny("causal")
    model.requires_grad_(False)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if trained in name:
            tensor.requires_grad_(True)
    assert num_below(model) == below  # the head is tied to the embeddings
