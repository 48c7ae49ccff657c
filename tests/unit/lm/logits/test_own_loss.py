"""The model's own loss from the labelled positions only: the same number, for every causal model, or its own way."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.contract.discovered import bind, example, with_fields
from tests.models import (
    DECODERS,
    EVERY,
    VOCAB,
    batch_for,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mixtral,
    tiny_roberta_mlm,
    tiny_t5,
)
from tests.unit.engines.test_frozen_prefix import padded
from tests.unit.lm.data.test_packing import perturbed_losses
from zoft.lm.logits import logits, support
from zoft.lm.logits.own_loss import is_known, own_loss


def labelled(seed: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Padded rows of which a few tokens have a label."""
    batch = padded([11, 5, 8], side, seed=seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, ::3] = -100
    labels[2, -6:] = -100
    return batch | {"labels": labels}


def plainly(model, batch) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


@pytest.fixture
def log_lines(caplog):
    caplog.set_level(logging.INFO, logger="zoft")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("zoft")]


@pytest.fixture
def seen(monkeypatch):
    """Positions that went through the head, call by call."""

    def watch(model):
        shapes: list[int] = []
        model.get_output_embeddings().register_forward_hook(
            lambda _m, _a, output: shapes.append(output.shape[:-1].numel())
        )
        return shapes

    return watch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_the_models_own(family, side, seen, log_lines):
    model = DECODERS[family]()
    for seed in range(3):
        batch = labelled(seed, side)
        for count in ({}, {"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 9}):
            with torch.no_grad():
                wanted = plainly(model, batch | count)
                loss = own_loss(model, **batch, **count)["loss"]
            assert loss.shape == ()
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=0)
    shapes = seen(model)
    with torch.no_grad():
        own_loss(model, **batch)
    assert shapes == [int((batch["labels"][:, 1:] != -100).sum())]
    assert log_lines() == []


@pytest.mark.parametrize("family", DECODERS)
def test_in_chunks_it_is_the_same(family, monkeypatch, log_lines):
    model = DECODERS[family]()
    monkeypatch.setattr(logits, "MAX_LOGITS", 4 * VOCAB)
    alive, real = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        logits.torch.nn.functional, "cross_entropy", lambda x, *a, **k: alive.append(x.numel()) or real(x, *a, **k)
    )
    for seed in range(2):
        batch = labelled(seed)
        with torch.no_grad():
            loss = own_loss(model, **batch)["loss"]
            assert max(alive[-3:]) <= 4 * VOCAB
            torch.testing.assert_close(loss, plainly(model, batch), rtol=2e-6, atol=0)
    assert log_lines() == [f"{type(model).__name__}: logits are computed 4 positions at a time"]


@pytest.mark.parametrize("count", [{}, {"num_items_in_batch": torch.tensor(5)}])
def test_a_batch_without_labels_settles_nothing_and_costs_what_it_costs(count):
    model = tiny_llama()
    empty = labelled(0)
    empty["labels"] = torch.full_like(empty["labels"], -100)
    with torch.no_grad():
        torch.testing.assert_close(
            own_loss(model, **empty, **count)["loss"], plainly(model, empty | count), equal_nan=True
        )
        assert not is_known(model, empty | count)
        own_loss(model, **labelled(0), **count)
        assert is_known(model, empty | count)
        torch.testing.assert_close(
            own_loss(model, **empty, **count)["loss"], plainly(model, empty | count), equal_nan=True
        )


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_roberta_mlm, tiny_t5])
def test_other_kinds_of_models_are_left_alone(make, log_lines):
    model = make()
    batch = batch_for(model)
    with torch.no_grad():
        assert torch.equal(own_loss(model, **batch).loss, model(**batch).loss)
    assert is_known(model, batch)
    assert log_lines() == []


def test_a_loss_that_takes_the_place_of_the_common_one_is_the_one_from_then_on():
    model, batch = tiny_llama(), labelled(0)
    with torch.no_grad():
        own_loss(model, **batch)
        model.loss_function = lambda logits, labels, **_: logits.mean()
        assert torch.equal(own_loss(model, **batch).loss, plainly(model, batch))


def with_another_loss(model):
    forward = type(model).forward

    class Penalised(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            if out.loss is not None:
                out.loss = out.loss + 0.25
            return out

    model.__class__ = Penalised
    return model


def test_a_model_that_adds_to_its_loss_keeps_it_and_is_named_once(log_lines):
    model = with_another_loss(tiny_llama())
    for seed in range(2):
        with torch.no_grad():
            assert torch.equal(own_loss(model, **labelled(seed))["loss"], model(**labelled(seed)).loss)
    assert log_lines() == [
        "Penalised: the loss is computed from the logits of all positions, not only from those that have a label: its "
        "own loss would be off by 0.25"
    ]


def test_a_count_that_the_class_ignores_is_ignored(log_lines):
    """Some classes take num_items_in_batch and do not hand it on."""
    model, forward = tiny_llama(), type(tiny_llama()).forward

    class Deaf(type(model)):
        def forward(self, *args, num_items_in_batch=None, **kwargs):
            return forward(self, *args, **kwargs)

    model.__class__ = Deaf
    batch = labelled(0) | {"num_items_in_batch": torch.tensor(40)}
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(own_loss(model, **batch)["loss"], model(**batch).loss)
        torch.testing.assert_close(own_loss(model, **labelled(0))["loss"], model(**labelled(0)).loss)
    assert len(log_lines()) == 1


def test_a_loss_that_is_not_finite_settles_nothing(log_lines):
    model = tiny_llama()
    clean = model.lm_head.weight.data.clone()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
        assert not bool(own_loss(model, **labelled(0))["loss"].isfinite())
        assert not is_known(model, labelled(0))
        model.lm_head.weight.copy_(clean)
        torch.testing.assert_close(own_loss(model, **labelled(0))["loss"], plainly(model, labelled(0)))
    assert is_known(model, labelled(0))
    assert log_lines() == []


def test_outputs_as_tuples(log_lines):
    model, batch = tiny_llama(), labelled(0) | {"return_dict": False}
    with torch.no_grad():
        torch.testing.assert_close(own_loss(model, **batch)["loss"], model(**batch)[0])
    assert log_lines() == []


def test_a_forward_that_needs_labels_gets_them(log_lines):
    model, forward = tiny_llama(), type(tiny_llama()).forward

    class Needy(type(model)):
        def forward(self, input_ids, labels, **kwargs):
            return forward(self, input_ids, labels=labels, **kwargs)

    model.__class__ = Needy
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(own_loss(model, **labelled(0))["loss"], model(**labelled(0)).loss)
    (line,) = log_lines()
    assert "missing 1 required positional argument: 'labels'" in line


def test_inside_a_query_what_is_unknown_is_done_plainly(seen):
    model = tiny_llama()
    shapes = seen(model)
    with torch.no_grad(), support.no_trials():
        own_loss(model, **labelled(0))
    assert shapes == [labelled(0)["labels"].numel()]


def test_through_an_adapter_and_in_low_precision(log_lines):
    from zoft.lm.models.peft.lora import Lora

    for model, rtol in ((Lora().wrap(tiny_llama(), 0).eval(), 2e-6), (tiny_llama().to(torch.bfloat16), 2e-2)):
        for seed in range(2):
            with torch.no_grad():
                loss, wanted = own_loss(model, **labelled(seed))["loss"], plainly(model, labelled(seed))
            torch.testing.assert_close(loss, wanted.float(), rtol=rtol, atol=0)
    assert log_lines() == []


@pytest.mark.parametrize("chunk", [2**24, 4 * VOCAB])
@pytest.mark.parametrize(
    ("engine", "family"),
    [*(("layerwise", family) for family in ("opt", "llama", "gemma2")), ("in_place", "opt"), ("side_path", "opt")],
)
def test_under_an_engine_the_losses_are_those_of_perturbed_weights(engine, family, chunk, monkeypatch, log_lines):
    model, batch = DECODERS[family](), labelled(0)
    monkeypatch.setattr(logits, "MAX_LOGITS", chunk)
    estimator = with_fields(example("estimator", "central"), num_directions=2, eps=1e-2)

    class Plain:
        def loss(self, model, batch):
            return plainly(model, batch)

    session = bind(
        example("engine", engine), estimator, model, lambda inputs: own_loss(model, **inputs)["loss"], "gaussian"
    )
    if hasattr(session, "swapper"):
        session.swapper.piece_bytes = 512
    points = estimator.points(estimator.directions(3, 1))
    first = session.losses(batch, points)
    assert torch.equal(session.losses(batch, points), first)
    torch.testing.assert_close(first, perturbed_losses(model, session, points, batch, Plain()), rtol=1e-6, atol=0)
    assert not [line for line in log_lines() if "outside" in line]


def test_every_family_has_a_way():
    for family, make in EVERY.items():
        model = make()
        batch = batch_for(model)
        with torch.no_grad():
            torch.testing.assert_close(own_loss(model, **batch)["loss"], model(**batch).loss, rtol=2e-6, atol=0), family


# ------------------------------------------------------------------------------------- fault 4: a term beside the loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [1e-6, 0.001, 0.006, 0.1])
def test_fault_4_a_routers_loss_is_trained_at_any_coefficient(dtype, coefficient):
    model = tiny_mixtral(output_router_logits=True, router_aux_loss_coef=coefficient).to(dtype)
    for batch in (batch_for(model), labelled(1), labelled(2) | {"num_items_in_batch": torch.tensor(9)}):
        with torch.no_grad():
            assert torch.equal(own_loss(model, **batch)["loss"], plainly(model, batch))


def test_fault_4_a_routers_loss_that_is_switched_on_later_is_trained():
    model = tiny_mixtral().to(torch.bfloat16)
    with torch.no_grad():
        own_loss(model, **labelled(0))
        model.config.output_router_logits = True
        assert torch.equal(own_loss(model, **labelled(0))["loss"], plainly(model, labelled(0)))
        model.config.output_router_logits = False
        batch = labelled(0) | {"output_router_logits": True}
        assert torch.equal(own_loss(model, **batch)["loss"], plainly(model, batch))


def beside(model, change):
    """A class that does something with its loss behind its cross-entropy."""
    forward = type(model).forward

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            if out.loss is not None:
                change(out)
            return out

    model.__class__ = Changed
    return model


def _added(out):
    out.loss = out.loss + 1e-7


def _added_in_place(out):
    out.loss += 1e-5 * out.logits.float().square().mean()


def _nothing_yet(out):
    out.loss += torch.relu(out.logits.float().abs().max() - 1e6)


def _scaled(out):
    out.loss = out.loss * 1.001


def _focal(out):
    out.loss = out.loss * (1 - torch.exp(-out.loss)) ** 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [_added, _added_in_place, _nothing_yet, _scaled, _focal])
def test_fault_4_whatever_a_class_does_with_its_loss_is_kept(change, dtype):
    model = beside(tiny_llama().to(dtype), change)
    for seed in range(2):
        with torch.no_grad():
            assert torch.equal(own_loss(model, **labelled(seed))["loss"], plainly(model, labelled(seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_4_what_an_adapter_adds_to_the_loss_is_kept(dtype):
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=9, orth_reg_weight=1e-3)
    model = get_peft_model(tiny_llama().to(dtype), config).eval()
    with torch.no_grad():
        for _ in range(2):
            wanted = model(**labelled(0))["loss"]
            assert torch.equal(own_loss(model, **labelled(0))["loss"], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fault_4_a_class_that_smooths_its_labels_a_little_keeps_its_loss(dtype):
    from transformers.loss.loss_utils import ForCausalLMLoss

    model, forward = tiny_llama().to(dtype), type(tiny_llama()).forward

    class Smoothed(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            return forward(self, *args, labels=labels, label_smoothing=0.01, **kwargs)

    model.__class__ = Smoothed
    assert model.loss_function is ForCausalLMLoss
    with torch.no_grad():
        for _ in range(2):
            try:
                wanted = plainly(model, labelled(0))
            except TypeError:
                pytest.skip("this release of transformers does not hand it on")
            torch.testing.assert_close(
                own_loss(model, **labelled(0))["loss"].float(), wanted.float(), rtol=1e-5, atol=0
            )
