"""Quantised bases: adapters and scales train, resume and replay to the bit, and what cannot be is one sentence."""

import json

import pytest
import torch

from tests import models, runs
from tests.few_bits import coded
from tests.used import chatting, used
from zoft.config import compose
from zoft.errors import UserError
from zoft.lm.models import quantized
from zoft.lm.models.load import load_model
from zoft.lm.models.trainable.scales import Scales
from zoft.run.build import arguments_of, load, load_model_of, make_trainer
from zoft.run.train import run
from zoft.weights.tensors import Weights

PACKAGE = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao"}
LORA = ("peft=lora", "peft.r=2", "trainable=adapter", "optimizer.learning_rate=1e-2")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64, packed by 32 rows on a CPU


def arguments(folder, output_dir, *more):
    if not (folder / "model").exists():
        runs.model_folder(folder / "model", **WIDE)
        runs.data_file(folder / "data.jsonl")
    return runs.arguments(folder, output_dir, *more)


def words(folder, output_dir, quantization, *more):
    return [*arguments(folder, output_dir, *LORA, f"model.quantization={quantization}"), *more]


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_lora_trains_on_it_and_goes_on_to_the_bit(quantization, tmp_path, monkeypatch):
    pytest.importorskip(PACKAGE[quantization])
    report = run(compose(words(tmp_path, tmp_path / "whole", quantization)))
    model = load_model_of(compose(words(tmp_path, tmp_path / "whole", quantization)))
    assert quantized.is_quantized(model)
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in Weights(model).tensors}
    assert report["peak_memory_mb"] > 0
    cut = run(compose(words(tmp_path, tmp_path / "cut", quantization, "budget.queries=12")))
    assert cut["num_queries"] == 12
    longer = run(compose(words(tmp_path, tmp_path / "cut", quantization)))  # the same command with a larger budget
    assert longer["weights_sha256"] == report["weights_sha256"]


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_replay_rebuilds_the_adapter_on_it(quantization, tmp_path, capsys):
    pytest.importorskip(PACKAGE[quantization])
    from zoft.cli import main

    report = run(compose(words(tmp_path, tmp_path / "whole", quantization)))
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "whole")]) == 0
    assert report["weights_sha256"] in capsys.readouterr().out


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_a_base_is_known_by_all_its_parts(quantization, tmp_path):
    """Codes and scales: a base whose scales alone differ is another one."""
    pytest.importorskip(PACKAGE[quantization])
    arguments(tmp_path, tmp_path / "out")
    model = load_model(str(tmp_path / "model"), quantization=quantization)
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    parts = quantized.stored_parts(parameter)
    assert len(parts) >= 2, name
    assert {part.dtype for part in parts} >= {torch.float32}
    assert sum(part.numel() * part.element_size() for part in parts) < 2 * parameter.numel()


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_saving_leaves_the_base_as_it_is(quantization, tmp_path):
    """bitsandbytes packs 4-bit codes for a CPU and unpacks them, rounded, for every state_dict()."""
    pytest.importorskip(PACKAGE[quantization])
    arguments(tmp_path, tmp_path / "out")
    model = load_model(str(tmp_path / "model"), quantization=quantization).eval()
    ids, losses = torch.arange(12).view(2, 6), []
    for _ in range(3):
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
        model.state_dict()
    assert len(set(losses)) == 1


def test_loss_stays_near_that_of_the_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments(tmp_path, tmp_path / "out")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        losses = [
            float(load_model(str(tmp_path / "model"), quantization=kind)(ids, labels=ids).loss)
            for kind in (None, "int8", "nf4")
        ]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[2] == pytest.approx(losses[0], rel=5e-2)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("model.quantization=nf3",), r"model\.quantization must be one of nf4, int8, int8_torchao, got 'nf3'"),
        (("model.quantization=int8",), r"a step is too small for them: train an adapter on top"),
        (
            ("model.quantization=int8", "peft=lora", "trainable=all"),
            r"only the adapter is saved: use trainable=adapter",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(more, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=sentence):
        compose([*arguments(tmp_path, tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install 'zoft\[quant\]'"):
        compose(words(tmp_path, tmp_path / "out", "nf4"))


def test_a_checkpoint_that_is_quantised_already_wants_an_adapter(tmp_path):
    """Loaded as transformers loads it, whatever wrote it; without an adapter nothing could move."""
    pytest.importorskip("bitsandbytes")
    arguments(tmp_path, tmp_path / "out")
    load_model(str(tmp_path / "model"), quantization="int8").save_pretrained(tmp_path / "few")
    (tmp_path / "few" / "generation_config.json").unlink(missing_ok=True)
    assert "quantization_config" in json.loads((tmp_path / "few" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "few" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    given = [*arguments(tmp_path, tmp_path / "out")]
    given[given.index(f"model.name={tmp_path / 'model'}")] = f"model.name={tmp_path / 'few'}"
    with pytest.raises(UserError, match=r"is quantised, and a step is too small"):
        load_model_of(compose(given))
    assert quantized.is_quantized(load_model_of(compose([*given, *LORA])))


QZO = ("method=qzo", "optimizer.learning_rate=1")


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_scales_train_and_go_on_and_replay_to_the_bit(quantization, tmp_path, capsys):
    """Whole, interrupted with a checkpoint, replayed; and the saved model is a quantised one of transformers' own."""
    pytest.importorskip(PACKAGE[quantization])
    from zoft.cli import main

    given = [*arguments(tmp_path, tmp_path / "whole", *QZO), f"model.quantization={quantization}"]
    report = run(compose(given))
    cut = [*arguments(tmp_path, tmp_path / "cut", *QZO), f"model.quantization={quantization}"]
    run(compose([*cut, "budget.queries=12"]))
    assert run(compose(cut))["weights_sha256"] == report["weights_sha256"]
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "whole"), "--output", str(tmp_path / "again")]) == 0
    assert report["weights_sha256"] in capsys.readouterr().out
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        first, last, again = (
            float(load_model(str(folder), quantization=quantization)(ids, labels=ids).loss)
            for folder in (tmp_path / "model", tmp_path / "whole" / "model", tmp_path / "again")
        )
    assert first != last == again


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_a_saved_model_has_the_losses_of_moved_scales_and_the_base_none_of_them(quantization, tmp_path):
    pytest.importorskip(PACKAGE[quantization])
    arguments(tmp_path, tmp_path / "out")
    ids = torch.arange(12).view(2, 6)
    model = load_model(str(tmp_path / "model"), quantization=quantization).eval()
    Scales().apply(model)
    frozen = {n: [x.clone() for x in quantized.stored_parts(p)] for n, p in model.named_parameters()}
    with torch.no_grad():
        start = float(model(ids, labels=ids).loss)
        for tensor in Weights(model).tensors.values():
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        moved = float(model(ids, labels=ids).loss)
        model.save_pretrained(tmp_path / "saved")
        for tensor in Weights(model).tensors.values():
            tensor.zero_()
        assert float(model(ids, labels=ids).loss) == start != moved
        saved = load_model(str(tmp_path / "saved"), quantization=quantization).eval()
        assert float(saved(ids, labels=ids).loss) == moved
    for name, parameter in model.named_parameters():
        now = quantized.stored_parts(parameter)
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], now, strict=False)), name


def test_scales_that_are_quantised_once_more_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers

    arguments(tmp_path, tmp_path / "out")
    twice = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=twice, device_map={"": "cpu"}
    )
    with pytest.raises(UserError, match=r"quantised once more \(bnb_4bit_use_double_quant\)"):
        Scales().apply(model)


def test_another_quantisation_than_the_checkpoints_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments(tmp_path, tmp_path / "out")
    load_model(str(tmp_path / "model"), quantization="int8").save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match=r"the checkpoint is quantised already, as int8: leave model\.quantization out"):
        load_model(str(tmp_path / "few"), quantization="nf4")


@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_node_directions_train_a_lora_and_never_write_the_base(quantization, tmp_path):
    pytest.importorskip(PACKAGE[quantization])
    given = words(tmp_path, tmp_path / "whole", quantization, "method=zoft", "optimizer.learning_rate=1")
    cfg = compose(given)
    model, tokenizer, rows = load(cfg)
    frozen = {n: quantized.stored_parts(p) for n, p in model.named_parameters() if not p.requires_grad}
    frozen = {name: [(part, part.clone()) for part in parts] for name, parts in frozen.items()}
    before = Weights(model).digest()
    make_trainer(cfg, arguments_of(cfg), model, tokenizer, rows).train()
    assert Weights(model).digest() != before
    assert all(torch.equal(now, then) for parts in frozen.values() for now, then in parts)
    report = run(compose([*given, f"output_dir={tmp_path / 'run'}"]))
    cut = [*given, f"output_dir={tmp_path / 'cut'}"]
    run(compose([*cut, "budget.queries=12"]))
    assert run(compose(cut))["weights_sha256"] == report["weights_sha256"]


@pytest.mark.parametrize("method", ["lora", "qzo"])
@pytest.mark.parametrize("quantization", quantized.QUANTIZATIONS)
def test_a_run_on_it_is_used_and_exported(quantization, method, tmp_path, capsys, monkeypatch):
    """Labels, texts, an evaluation, and a merged model of plain weights that has the trained one's losses."""
    pytest.importorskip(PACKAGE[quantization])
    from zoft.cli import main
    from zoft.evaluation.evaluate import model_of
    from zoft.use.inference.load import config_of

    chatting(tmp_path, **WIDE)
    how = QZO if method == "qzo" else LORA
    run(compose(runs.arguments(tmp_path, tmp_path / "run", *how, f"model.quantization={quantization}")))
    said = used(tmp_path / "run", tmp_path / "used", capsys, monkeypatch)
    assert said == used(tmp_path / "run", tmp_path / "again", capsys, monkeypatch)
    assert main(["export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'export'}", "--merge"]) == 0
    if method == "lora":
        assert main(["export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'adapter'}"]) == 0
        assert f"in {quantization}: on the plain weights" in (tmp_path / "adapter" / "README.md").read_text()
    ids = torch.arange(12).view(2, 6)
    trained = model_of(config_of(str(tmp_path / "run"), []), str(tmp_path / "run")).eval()
    merged = load_model(str(tmp_path / "export"), quantization=None if method == "lora" else quantization).eval()
    assert quantized.is_quantized(merged) == (method == "qzo")
    rounded = 5e-3 if quantization == "int8" else 1e-5  # which rounds activations, too
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for model in (trained, merged)]
    assert losses[1] == pytest.approx(losses[0], rel=rounded)


def test_values_that_nobody_can_give_are_one_sentence(monkeypatch):
    """As of GPTQ and AWQ, whose quantisers have no way back."""

    def dequantize(*_):
        raise NotImplementedError

    model = coded(models.tiny_opt())
    monkeypatch.setattr(type(model), "dequantize", dequantize)
    with pytest.raises(UserError, match=r"^the base is quantised by few bits, .* without --merge and --gguf$"):
        quantized.dequantized(model)


def test_trained_tensors_on_meta_are_refused():
    """accelerate's offloading leaves weights on meta, where a step would do nothing and say nothing."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    with pytest.raises(UserError, match=r"^weight is to be trained and has no values in memory"):
        Weights(model)
