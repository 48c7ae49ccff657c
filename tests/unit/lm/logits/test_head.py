"""Logits where they count: equal to the plain ones, in bounded memory, and plain where a model cannot be served."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.models import CAUSAL, DECODERS, VOCAB, tiny_gemma2, tiny_llama, tiny_opt
from tests.unit.engines.test_frozen_prefix import padded
from zoft.lm.logits import head, logits, support
from zoft.lm.logits.call import arguments
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at, logits_at

TOKENS = torch.tensor([3, 60, 17])


def wanted_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def example(model, lengths=(9, 4, 7), seed=0):
    """Left-padded inputs, some places in them, and the plain logits there."""
    batch = padded(list(lengths), "left", seed=seed)
    inputs = arguments(model, batch["input_ids"], batch["attention_mask"])
    row = torch.tensor([0, 0, 1, 2, 2, 2])
    column = torch.tensor([-8, -1, -3, -7, -4, -2])
    return inputs, Positions(row, column), wanted_of(model, inputs)[row, column]


def close(result, wanted):
    torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture
def log_lines(caplog):
    caplog.set_level(logging.INFO, logger="zoft.lm.logits")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("zoft")]


@pytest.mark.parametrize("family", DECODERS)
def test_logits_at_places_equal_the_plain_ones(family, log_lines):
    model = DECODERS[family]()
    for seed in range(2):
        inputs, places, wanted = example(model, seed=seed)
        with torch.no_grad():
            close(logits_at(model, inputs, places), wanted)
            close(logits_at(model, inputs, places, TOKENS), wanted[:, TOKENS])
            targets = torch.arange(len(places)) * 9
            log_probs = torch.log_softmax(wanted, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
            close(log_probs_at(model, inputs, places, targets), log_probs)
    known = support.probe(model, inputs, places)
    assert known.rows
    assert known.tokens
    assert known.vocabulary == VOCAB
    assert log_lines() == []


@pytest.mark.parametrize("per_chunk", [1, 4, 5, 6])
@pytest.mark.parametrize("family", DECODERS)
def test_chunks_are_the_same_from_one_forward_with_few_logits_alive(family, per_chunk, monkeypatch, log_lines):
    model = DECODERS[family]()
    inputs, places, wanted = example(model)
    targets = torch.arange(len(places)) * 7
    log_probs = torch.log_softmax(wanted, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    monkeypatch.setattr(logits, "MAX_LOGITS", per_chunk * VOCAB + 1)
    sizes, calls = [], []
    with torch.no_grad():
        log_probs_at(model, inputs, places, targets)
        real = torch.nn.functional.cross_entropy
        monkeypatch.setattr(
            torch.nn.functional, "cross_entropy", lambda x, *a, **k: sizes.append(x.numel()) or real(x, *a, **k)
        )
        handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
        close(log_probs_at(model, inputs, places, targets), log_probs)
        handle.remove()
    assert max(sizes) <= logits.MAX_LOGITS
    assert len(calls) == 1
    assert bool(log_lines()) == (per_chunk < len(places))


def test_a_batch_is_computed_in_parts_where_the_head_cannot_be(monkeypatch, log_lines):
    """A cap behind the head that no field of the config tells of."""
    model = tiny_gemma2()
    inputs, places, wanted = example(model)
    targets = torch.arange(len(places)) * 7
    log_probs = torch.log_softmax(wanted, -1).gather(1, targets.unsqueeze(1)).squeeze(1)
    monkeypatch.setattr(support, "_TRANSFORMS", [])
    monkeypatch.setattr(logits, "MAX_LOGITS", 3 * VOCAB)
    rows = []
    with torch.no_grad():
        log_probs_at(model, inputs, places, targets)
        model.register_forward_pre_hook(lambda _m, _a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
        close(log_probs_at(model, inputs, places, targets), log_probs)
    assert rows == [2, 1]
    assert log_lines() == ["Gemma2ForCausalLM: the logits of a batch are too many at once: it is computed in parts"]


# ---------------------------------------------------------------------------------------------------------- fallbacks


class NoRows(nn.Module):
    """A head whose outputs depend on each other: rows alone come out different."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight
        self.out_features = len(head.weight)

    def forward(self, hidden):
        return nn.functional.linear(hidden - hidden.mean(1, keepdim=True), self.weight)


def whole_batch_only(model):
    model.set_output_embeddings(NoRows(model.get_output_embeddings()))
    return model


def called_twice(model):
    head, forward = model.get_output_embeddings(), type(model).forward

    class Twice(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            self.lm_head(torch.zeros(1, 1, head.in_features))
            return out

    model.__class__ = Twice
    return model


def without_a_head(model):
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (whole_batch_only, "its logits come out different"),
        (called_twice, "its head is"),
        (without_a_head, "it names no output embeddings"),
    ],
)
@pytest.mark.parametrize("bound", [2**24, 2 * 9 * VOCAB])
def test_a_model_that_cannot_be_served_is_called_plainly_and_named_once(spoil, why, bound, monkeypatch, log_lines):
    model = spoil(tiny_opt())
    inputs, places, wanted = example(model)
    monkeypatch.setattr(logits, "MAX_LOGITS", bound)
    if spoil is whole_batch_only:
        inputs = {**inputs, "logits_to_keep": 0}
        monkeypatch.setattr(logits, "takes", lambda *_: False)  # its own logits_to_keep would be as wrong
    targets = torch.zeros(len(places), dtype=torch.int64)
    with torch.no_grad():
        for _ in range(2):
            close(logits_at(model, inputs, places), wanted)
            close(logits_at(model, inputs, places, TOKENS), wanted[:, TOKENS])
            close(log_probs_at(model, inputs, places, targets), torch.log_softmax(wanted, -1)[:, 0])
    warnings = [line for line in log_lines() if "the head is applied to all positions" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(type(model).__name__)
    assert why in warnings[0]


class LooksAround(nn.Module):
    """A head that mixes a little of the other rows into each."""

    def __init__(self, head, share):
        super().__init__()
        self.weight, self.share = head.weight, share
        self.out_features = len(head.weight)

    def forward(self, hidden):
        return nn.functional.linear(hidden + self.share * hidden.mean(1, keepdim=True), self.weight)


def behind_the_head(model, change):
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = change(out.logits)
            return out

    model.__class__ = Changed
    return model


def _sequence_mean(logits):
    return logits + 1e-3 * logits.mean(1, keepdim=True)


def _vocabulary_mean(logits):
    return logits - 0.002 * logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoil", ["head", "behind", "vocabulary"])
def test_fault_4_logits_that_depend_a_little_on_others_are_computed_plainly(spoil, dtype, log_lines):
    """Less than 16 bits tell two kernels apart by, so that no tolerance shows it."""
    model = tiny_llama().to(dtype)
    if spoil == "head":
        model.set_output_embeddings(LooksAround(model.get_output_embeddings(), 1e-3))
    else:
        behind_the_head(model, _sequence_mean if spoil == "behind" else _vocabulary_mean)
    inputs, places, wanted = example(model)
    with torch.no_grad():
        for _ in range(2):
            logits_at(model, inputs, places, TOKENS)
    known = support.probe(model, inputs, places)
    assert known.rows == (spoil == "vocabulary")  # what depends on its own row alone is served, whole
    assert not known.tokens
    with torch.no_grad():
        torch.testing.assert_close(logits_at(model, inputs, places, TOKENS), wanted[:, TOKENS].float())


def test_a_batch_that_says_nothing_settles_nothing():
    model = tiny_llama()
    inputs, places, wanted = example(model)
    clean = model.lm_head.weight.data.clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
        assert not bool(logits_at(model, inputs, places).isfinite().any())
        assert not support.is_known(model)
        model.lm_head.weight.copy_(clean)
        close(logits_at(model, inputs, places), wanted)
    assert support.is_known(model)


def test_nothing_is_tried_inside_a_query():
    """Engines reuse from one query what the next would compute again: they must all call the model alike."""
    model = tiny_llama()
    inputs, places, wanted = example(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad(), support.no_trials():
        close(logits_at(model, inputs, places), wanted)
    assert len(calls) == 1
    assert not support.is_known(model)


def test_the_trial_makes_few_logits(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(support, "PIECE", 10 * VOCAB)
    seen = []
    inputs, places, _ = example(model, lengths=(40, 4, 30))
    model.lm_head.register_forward_hook(lambda _m, _a, output: seen.append(output.numel()))
    with torch.no_grad():
        logits_at(model, inputs, places)
    assert max(seen[:-1]) <= support.PIECE
    assert seen[-1] == len(places) * VOCAB


def test_another_head_is_tried_anew():
    model = tiny_llama()
    inputs, places, _ = example(model)
    with torch.no_grad():
        logits_at(model, inputs, places)
        model.resize_token_embeddings(VOCAB + 8)
        close(logits_at(model, inputs, places), wanted_of(model, inputs)[places.row, places.column])
    assert support.probe(model, inputs, places).vocabulary == VOCAB + 8


# ----------------------------------------------------------------------------------------------------------- wrappings


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters(targets, modules_to_save, log_lines):
    from peft import LoraConfig, get_peft_model

    if modules_to_save and "lm_head" in targets:
        pytest.skip("peft does one or the other")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, modules_to_save=modules_to_save, init_lora_weights=False
    )
    model = get_peft_model(tiny_llama(), config).eval()
    inputs, places, wanted = example(model)
    with torch.no_grad():
        close(logits_at(model, inputs, places), wanted)
        close(logits_at(model, inputs, places, TOKENS), wanted[:, TOKENS])
    assert support.probe(model, inputs, places).rows
    assert log_lines() == []


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_in_front_do_not_shift_the_places(kind, log_lines):
    from zoft.component import create

    model = create("peft", kind, kind).wrap(tiny_llama(), 0).eval()
    inputs, places, wanted = example(model)
    with torch.no_grad():
        close(logits_at(model, inputs, places), wanted)
    assert support.probe(model, inputs, places).rows
    assert log_lines() == []


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(family, dtype, log_lines):
    model = CAUSAL[family]().to(dtype)
    inputs, places, wanted = example(model)
    with torch.no_grad():
        result = logits_at(model, inputs, places)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, wanted.float(), rtol=2e-2, atol=2e-2)
    assert log_lines() == []


def test_a_compiled_model_keeps_its_ends_only(log_lines):
    model = tiny_llama()
    inputs, places, wanted = example(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        close(logits_at(compiled, inputs, places), wanted)
        close(logits_at(compiled, inputs, places, TOKENS), wanted[:, TOKENS])
    assert log_lines() == []
    torch._dynamo.reset()


def test_forwards_side_by_side_ask_the_head_for_what_each_wants():
    """As an engine interleaves them: both are inside the model when the first one's head is called."""
    greenlet = pytest.importorskip("greenlet")
    import contextvars

    model = tiny_llama()
    inputs, places, wanted = example(model)
    with torch.no_grad():
        logits_at(model, inputs, places)

    def wait(*_):
        greenlet.getcurrent().parent.switch()

    model.model.layers[1].register_forward_pre_hook(wait)

    def some(which):
        with torch.no_grad():
            return logits_at(model, inputs, places.chosen(which))

    first = torch.arange(len(places)) < 2
    runners = [greenlet.greenlet(lambda which=which: some(which)) for which in (first, ~first)]
    for runner in runners:
        runner.gr_context = contextvars.copy_context()
        runner.switch()
    results = [runner.switch() for runner in runners]
    torch.set_grad_enabled(True)  # what zoft.engines._lockstep keeps apart: the contexts did not close in order
    close(torch.cat(results), wanted)
    assert "forward" not in vars(model.lm_head)
    assert not head._replaced


def test_a_forward_that_raises_leaves_the_head_as_it_was():
    model = tiny_llama()
    inputs, places, _ = example(model)
    forward = model.lm_head.forward
    model.lm_head.forward = forward  # as an engine or accelerate may have replaced it

    def explode(*_):
        raise RuntimeError("halfway")

    handle = model.model.norm.register_forward_pre_hook(explode)
    with torch.no_grad(), pytest.raises(RuntimeError, match="halfway"):
        logits_at(model, inputs, places)
    handle.remove()
    with torch.no_grad():
        logits_at(model, inputs, places)
    assert vars(model.lm_head)["forward"] is forward
