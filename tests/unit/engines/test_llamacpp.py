"""engine=llamacpp: torch's losses and texts from a GGUF base, and a base in few bits trains; `make test-llamacpp`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models, runs
from tests.unit.engines.test_onnx import LORA, POINTS, batch, options_of_some_tokens
from tests.unit.use.export.test_export import pairs_tokenizer
from zoft.cli import main
from zoft.config import compose
from zoft.engines import _llama_library
from zoft.engines.in_place import InPlace
from zoft.engines.llamacpp import LlamaCpp
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lm.models.generate import Answering, write
from zoft.lm.models.peft.lora import Lora
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.lm.objectives.options import Options
from zoft.run.build import load
from zoft.run.train import run
from zoft.subspaces.full import Full
from zoft.use.export.gguf_file import write_gguf
from zoft.weights.tensors import Weights


def make(kind: str = "llama", **fields: Any) -> Any:
    """Matrices of 32 columns and more, which GGUF's blocks want; a vocabulary of byte-level pairs."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": len(pairs_tokenizer())}
    return models.CAUSAL[kind](**wide | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed here: `make test-llamacpp` installs it")
    root = tmp_path_factory.mktemp("llamacpp")
    for kind in ("llama", "qwen"):
        make(kind).save_pretrained(root / kind)
        pairs_tokenizer().save_pretrained(root / kind)
        write_gguf(make(kind), pairs_tokenizer(), root / f"{kind}.gguf", "f32", kind)
    write_gguf(make(), pairs_tokenizer(), root / "llama-q8.gguf", "q8_0", "llama")
    return root


def session(engine: Any, kind: str = "llama", objective: Any = None, **peft: Any) -> Any:
    """At an adapter that does something."""
    model = Lora(r=2, **peft).wrap(make(kind), seed=0)
    coordinates = Full().bind(Weights(model), "counter")
    objective = objective or Options()
    bound = engine.bind(model, coordinates, lambda rows: objective.loss(model, rows))
    for name, tensor in bound.weights.tensors.items():  # B is zero at the start
        tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return bound


@pytest.mark.parametrize("kind", ["llama", "qwen"])
@pytest.mark.parametrize("objective", [Options(), CrossEntropy()], ids=lambda o: o.name())
@pytest.mark.parametrize(
    "rows", [batch(), batch(20, 17, seed=1), options_of_some_tokens()], ids=["3x9", "20x17", "many"]
)
def test_losses_are_torchs_at_every_point(folder, kind, objective, rows):
    all_matrices = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    wanted = session(InPlace(), kind, objective, **all_matrices).losses(rows, POINTS)
    llamacpp = session(LlamaCpp(file=str(folder / f"{kind}.gguf")), kind, objective, **all_matrices)
    losses = llamacpp.losses(rows, POINTS)
    assert wanted.unique().numel() == len(POINTS)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_texts_are_torchs_with_its_noise(folder, temperature):
    here, llamacpp = session(InPlace()), session(LlamaCpp(file=str(folder / "llama.gguf")))
    answering = Answering(pairs_tokenizer(), 8, stop="es")
    prompts = [[4, 5, 6], [7, 8], *[[9 + n, 10, 11, 12] for n in range(20)]]
    texts = [write(one.model, prompts, answering, temperature=temperature, seed=3).texts for one in (here, llamacpp)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


def words(folder: Path, output_dir: Path, *more: str) -> list[str]:
    given = runs.arguments(folder, output_dir, *LORA, *more)
    return [word for word in given if not word.startswith("model.name")] + [f"model.name={folder / 'llama'}"]


@pytest.fixture
def with_data(folder: Path) -> Path:
    if not (folder / "data.jsonl").exists():
        (folder / "model").mkdir()
        runs.data_file(folder / "data.jsonl")
    return folder


def test_a_run_is_torchs_and_goes_on_to_the_bit_on_its_own_base_alone(with_data, tmp_path, capsys):
    engine_words = ["engine=llamacpp", f"engine.file={with_data / 'llama.gguf'}"]
    torchs = run(compose(words(with_data, tmp_path / "torch", "engine=in_place")))
    whole = run(compose(words(with_data, tmp_path / "whole", *engine_words)))
    of_torch, of_llama = (load_file(tmp_path / n / "model" / "adapter_model.safetensors") for n in ("torch", "whole"))
    for name, tensor in of_torch.items():
        torch.testing.assert_close(of_llama[name], tensor, atol=1e-4, rtol=0)
    assert whole["final"] == torchs["final"]
    assert run(compose(words(with_data, tmp_path / "cut", *engine_words, "budget.queries=12")))["num_queries"] == 12
    assert run(compose(words(with_data, tmp_path / "cut", *engine_words)))["weights_sha256"] == whole["weights_sha256"]
    capsys.readouterr()
    assert main(["eval", f"run={tmp_path / 'whole'}", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert evaluation["accuracy"] == pytest.approx(whole["final"])
    other = ["engine=llamacpp", f"engine.file={with_data / 'llama-q8.gguf'}", "budget.queries=48"]
    assert main(["train", *words(with_data, tmp_path / "cut", *other)]) == 2
    assert "it differs in" in " ".join(capsys.readouterr().err.split())


def test_a_base_in_eight_bits_trains_and_none_is_loaded_here(with_data, tmp_path):
    given = words(with_data, tmp_path / "q8", "engine=llamacpp", f"engine.file={with_data / 'llama-q8.gguf'}")
    model, *_ = load(compose(given))
    assert any(tensor.is_meta for tensor in model.parameters())
    facts = run(compose(given))
    assert facts["num_queries"] == 24
    saved = load_file(tmp_path / "q8" / "model" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


def test_another_models_file_and_what_is_none_are_one_sentence(folder, tmp_path, monkeypatch):
    def bound(file: Path, **fields: Any) -> Any:
        model = Lora(r=2).wrap(make(**fields), seed=0)
        coordinates = Full().bind(Weights(model), "counter")
        return LlamaCpp(file=str(file)).bind(model, coordinates, lambda rows: Options().loss(model, rows))

    with pytest.raises(UserError, match=r"its architecture is qwen2, and that one's llama"):
        bound(folder / "qwen.gguf")
    with pytest.raises(UserError, match=r"its number of layers is 3, and that one's 2"):
        bound(folder / "llama.gguf", num_hidden_layers=2)
    (tmp_path / "none.gguf").write_text("text")
    with pytest.raises(UserError, match=r"is no GGUF file that llama.cpp loads"):
        bound(tmp_path / "none.gguf")
    monkeypatch.setattr(_llama_library, "_DEFAULTS", (1,))
    with pytest.raises(UserError, match=r"knows the C structures of xllamacpp .* pip install 'xllamacpp=="):
        bound(folder / "llama.gguf")


def test_what_is_not_there_is_said_before_anything_is_read(tmp_path, monkeypatch):
    cfg = compose([*runs.arguments(tmp_path, tmp_path / "out", *LORA), "engine=llamacpp"])
    with pytest.raises(UserError, match=r"needs engine.file=MODEL.gguf"):
        run(cfg)
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr(_llama_library.importlib.util, "find_spec", lambda name: None)
    cfg.engine.file = str(tmp_path / "some.gguf")
    with pytest.raises(UserError, match=r"needs xllamacpp: pip install 'xllamacpp=="):
        run(cfg)
    assert not (tmp_path / "out").exists()


def test_rows_of_which_nothing_is_scored_are_left_out(folder):
    llamacpp, rows = session(LlamaCpp(file=str(folder / "llama.gguf"))), batch(20, 9)
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    alone = {name: value[17:18] for name, value in inputs.items()}
    tokens = torch.tensor([[5, 9]])
    of_one, of_many = (
        llamacpp.log_probs(some, torch.tensor([row]), torch.tensor([-2]), tokens)
        for some, row in ((alone, 0), (inputs, 17))
    )
    assert torch.equal(of_one, of_many)


def test_losses_move_with_a_step(folder):
    llamacpp = session(LlamaCpp(file=str(folder / "llama.gguf")))
    before = llamacpp.losses(batch(), [Point()])
    name = next(name for name in llamacpp.weights.tensors if "lora_B" in name)
    llamacpp.apply_(name, 0, 8, torch.full((8,), 0.5))
    assert not torch.equal(llamacpp.losses(batch(), [Point()]), before)


def test_a_check_and_an_estimate_of_time_load_no_base_into_torch(with_data, tmp_path, monkeypatch, capsys):
    file = with_data / "llama.gguf"
    given = words(with_data, tmp_path / "out", "engine=llamacpp", f"engine.file={file}")
    monkeypatch.setattr("zoft.lm.models.load.load_model_as", None)
    assert main(["check", *given]) == 0
    capsys.readouterr()
    assert main(["estimate", *given, "--time", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert estimate["seconds"] > 0
    assert estimate["method"]["parts"]["weights"] == pytest.approx(file.stat().st_size / 2**20, abs=0.1)
