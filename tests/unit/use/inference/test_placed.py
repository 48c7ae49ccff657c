"""Models that rest elsewhere or lie on several devices are used as plain ones are: the same answers to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.models import batch_for, tiny_llama
from tests.used import chatting, used
from zoft.cli import main
from zoft.config import compose
from zoft.engines.offload import Offload
from zoft.lm.logits.call import inner
from zoft.run.train import run
from zoft.trainer.placing import to_read
from zoft.use.inference import load
from zoft.use.inference.load import load_run
from zoft.weights.mapped import is_mapped

LORA = ("peft=lora", "peft.r=2", "trainable=adapter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one model, plain, by engine=offload and with a device map, with and without an adapter."""
    root = chatting(tmp_path_factory.mktemp("placed"))
    placed = {"plain": (), "offload": ("engine=offload",), "map": ("model.device_map=cpu",)}
    for name, where in placed.items():
        for kind, more in (("whole", ()), ("lora", LORA)):
            words = runs.arguments(
                root, root / f"{name}-{kind}", *where, *more, "optimizer.learning_rate=0.1", "budget.queries=4"
            )
            run(compose(words))
    return root


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_every_verb_says_the_same(kind: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any):
    wanted = used(folder / f"plain-{kind}", tmp_path / "plain", capsys, monkeypatch)
    for name in ("offload", "map"):
        assert used(folder / f"{name}-{kind}", tmp_path / name, capsys, monkeypatch) == wanted


@pytest.mark.parametrize("name", ["offload", "map"])
def test_their_exports_are_the_same(name: str, folder: Path, tmp_path: Path, capsys: Any):
    files = []
    for one in ("plain", name):
        assert main(["export", f"run={folder / one}-lora", f"output={tmp_path / one}", "--merge"]) == 0
        files.append((tmp_path / one / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_an_offloaded_runs_blocks_rest_in_files_while_it_is_used(folder: Path):
    for kind in ("whole", "lora"):
        bare = inner(load_run(str(folder / f"offload-{kind}"), []).model)
        ids = torch.tensor([[4, 5, 6]])
        for _ in range(2):
            with torch.no_grad():
                bare(input_ids=ids)
            assert is_mapped(bare.model.layers[1].mlp.up_proj.weight.data)
            assert not is_mapped(bare.lm_head.weight.data)


@pytest.mark.parametrize("store", ["file", "memory"])
def test_two_blocks_at_a_time_compute_what_the_model_does(store: str):
    model, batch = tiny_llama(num_hidden_layers=5), batch_for(tiny_llama())
    with torch.no_grad():
        wanted = model(**batch).loss
        streamed = to_read(Offload(store), model, torch.device("cpu"))
        assert torch.equal(streamed(**batch).loss, wanted)
        texts = [streamed.generate(batch["input_ids"], max_new_tokens=6, do_sample=False) for _ in range(2)]
    assert torch.equal(*texts)
    plain = tiny_llama(num_hidden_layers=5).generate(batch["input_ids"], max_new_tokens=6, do_sample=False)
    assert torch.equal(texts[0], plain)


def test_a_model_on_several_devices_stays_there(folder: Path, monkeypatch: Any):
    """Two devices are not at hand: the model says that it is spread, and the device would show a move."""
    from zoft.evaluation import evaluate

    monkeypatch.setattr(load, "device", lambda **_: torch.device("meta"))
    model_of = evaluate.model_of

    def spread(*given: Any, **more: Any) -> Any:
        model = model_of(*given, **more)
        model.hf_device_map = {"model": 0, "lm_head": 1}
        return model

    monkeypatch.setattr(evaluate, "model_of", spread)
    loaded = load_run(str(folder / "map-whole"), [], with_base=True)
    assert not any(parameter.is_meta for model in (loaded.model, loaded.base_model) for parameter in model.parameters())


def test_a_run_on_the_cpu_is_used_there(monkeypatch: Any):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert load.device(on_cpu=True).type == "cpu"
    assert load.device().type == "cuda"
