"""Trained scales: relative steps beside codes that nobody writes; what is saved is an ordinary quantised model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests import models, runs
from tests.few_bits import CodedLinear, coded, with_trained_scales
from zoft import ZOConfig, ZOTrainer
from zoft.config import compose
from zoft.engines.in_place import InPlace
from zoft.engines.layerwise import Layerwise
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.estimators.forward_gradient import ForwardGradient
from zoft.lm.models import quantized
from zoft.lm.models.peft.lora import Lora
from zoft.lm.models.scales import LOG_SCALE, moved
from zoft.lm.models.trainable.scales import Scales
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.subspaces.nodes import Nodes
from zoft.weights.tensors import Weights


def stored(model):
    """Codes and scales of every quantised layer, as they lie in memory."""
    return {
        f"{name}.{kind}": part.clone()
        for name, module in model.named_modules()
        if isinstance(module, CodedLinear)
        for kind, part in (("codes", module.weight.data), ("scales", module.state.SCB))
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_number_a_scale_is_trained_and_nothing_else():
    model = coded(models.tiny_opt())
    scales = sum(part.numel() for name, part in stored(model).items() if name.endswith("scales"))
    trained, _ = Scales().apply(model)
    assert trained == scales
    assert {name.rpartition(".")[2] for name in Weights(model).tensors} == {LOG_SCALE}
    Scales().apply(model)  # what is attached already stays
    assert len(Weights(model).tensors) == len(stored(model)) / 2


@pytest.mark.parametrize("engine", [InPlace(), Layerwise()])
def test_losses_are_those_of_moved_scales_and_the_base_is_untouched(engine):
    model, plain = with_trained_scales(), coded(models.tiny_opt())
    batch, before = models.batch_for(model), stored(model)
    coordinates = Method.of().bind(Weights(model))
    session = engine.bind(model, coordinates, lambda batch: model(**batch).loss)
    direction = Direction(3, 0)
    losses = session.losses(batch, [Point(), Point(direction, 0.1), Point(direction, -0.1)])
    assert same(stored(model), before)
    for loss, scale in zip(losses, (0.0, 0.1, -0.1), strict=True):
        for name, module in plain.named_modules():
            if isinstance(module, CodedLinear):
                z = coordinates.z(direction, f"{name}.{LOG_SCALE}").view(-1)
                module.state.SCB = moved(before[f"{name}.scales"], scale * z)
        with torch.no_grad():
            assert float(plain(**batch).loss) == pytest.approx(float(loss), abs=1e-6)
    assert len(set(losses.tolist())) == 3


def test_an_interrupted_forward_leaves_the_base_as_it_was():
    model = with_trained_scales()
    before, layer = stored(model), next(m for m in model.modules() if isinstance(m, CodedLinear))
    layer.get_parameter(LOG_SCALE).data.fill_(0.5)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, layer.in_features + 1))
    assert same(stored(model), before)


def test_what_is_saved_is_a_quantised_model_with_moved_scales():
    model = with_trained_scales()
    for tensor in Weights(model).tensors.values():
        tensor.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    saved = model.state_dict()
    assert not any(LOG_SCALE in name for name in saved)
    loaded = coded(models.tiny_opt(seed=1))
    loaded.load_state_dict(saved)
    batch = models.batch_for(model)
    with torch.no_grad():
        assert float(loaded(**batch).loss) == float(model(**batch).loss)


def trainer(folder, model, **parts):
    batch = models.batch_for(models.tiny_opt(), rows=6, length=9)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(6)]
    args = ZOConfig(output_dir=str(folder), use_cpu=True, report_to=[], max_steps=30, learning_rate=0.5)
    return ZOTrainer(model, args, train_dataset=rows, **parts)


def test_the_trainer_takes_it_without_an_adapter_and_lowers_the_loss(tmp_path):
    """transformers refuses to train what is purely quantised; here its question is answered."""
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path / "refused", coded(models.tiny_opt()))
    model = with_trained_scales()
    before = stored(model)
    one = trainer(tmp_path / "run", model, estimator="central")
    one.train()
    batch = models.batch_for(models.tiny_opt(), rows=6, length=9)
    with torch.no_grad():
        start, end = (float(m(**batch).loss) for m in (with_trained_scales(), model))
    assert end < start - 5e-3
    assert same(stored(model), before)


@pytest.mark.parametrize("parts", [{"estimator": ForwardGradient()}, {"subspace": Nodes(), "estimator": "nodes"}])
def test_what_needs_more_than_losses_is_refused(parts, tmp_path):
    with pytest.raises(UserError, match=r"^trainable=scales"):
        trainer(tmp_path / "run", with_trained_scales(), **parts)


def test_a_base_without_scales_that_can_move_is_one_sentence():
    with pytest.raises(UserError, match=r"this model has none that zoft knows .* give model\.quantization=nf4"):
        Scales().apply(models.tiny_opt())
    with pytest.raises(UserError, match=r"an adapter lies on top of it"):
        Scales().apply(Lora(r=2).wrap(models.tiny_opt(), 0))
    layer = torch.nn.Linear(4, 4)
    layer.weight.quant_state = SimpleNamespace(nested=True, absmax=torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"quantised once more \(bnb_4bit_use_double_quant\)"):
        Scales().apply(layer)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["peft=lora"], r"trainable=scales trains the quantised base .* peft=lora puts an adapter"),
        (["subspace=nodes", "estimator=nodes"], r"trainable=scales moves vectors, and subspace=nodes"),
        (["subspace=activation"], r"trainable=scales moves vectors, and subspace=activation"),
        (["method=adamw", "trainable=scales"], r"losses alone, and estimator=backprop for a gradient"),
        (["method=senszoq", "trainable=scales"], r"losses alone, and subspace=sparse for a gradient"),
        (["engine=offload"], r"engine=offload moves plain tensors, and model\.quantization=int8_torchao has none"),
        (["model.dtype=bfloat16"], r"needs model\.dtype=float32: torchao rounds scales to bfloat16"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: name)
    base = runs.arguments(tmp_path, tmp_path / "out", "trainable=scales", "model.quantization=int8_torchao")
    with pytest.raises(UserError, match=sentence):
        compose([*base, *words])
