"""Whole runs on a card: every engine against the CPU, few bits, offloaded blocks, and a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.cuda.card import device, on
from zoft.config import compose
from zoft.journal import file as journal
from zoft.run.train import run

pytestmark = pytest.mark.cuda
SHORT = ["budget.queries=8", "trainer.save_strategy=no", "trainer.eval_strategy=no"]

ENGINES = {
    "in_place": ["engine=in_place"],
    "layerwise": ["engine=layerwise"],
    "layerwise, Rademacher": ["engine=layerwise", "subspace.law=rademacher"],
    "side_path": ["engine=side_path", "subspace=low_rank", "subspace.rank=2"],
    "offload": ["engine=offload"],
    "forward_mode": ["estimator=forward_gradient"],
    "LoRA": ["peft=lora", "peft.r=2"],
    "nodes": ["method=nodes"],
    "backprop": ["estimator=backprop", "optimizer=adam"],
}


def trained(folder: Path, name: str, *more: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The last weights, and the losses that were logged."""
    line = runs.arguments(folder, folder / name, *SHORT, "trainer.logging_steps=1", *more)
    assert run(compose(line))["peak_memory_mb"] > 0
    rows = [json.loads(row) for row in (folder / name / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (folder / name / "model").glob("*model.safetensors")
    return load_file(weights), [row["loss"] for row in rows if row.get("loss") is not None]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_trains_as_on_the_cpu(name, tmp_path):
    here, losses = trained(tmp_path, "here", *ENGINES[name], *on(device()))
    cpu_weights, wanted = trained(tmp_path, "cpu", *ENGINES[name], "trainer.use_cpu=true")
    assert losses == pytest.approx(wanted, rel=1e-3)
    for key, weight in cpu_weights.items():
        torch.testing.assert_close(here[key], weight, rtol=1e-2, atol=1e-4)


def test_offloaded_blocks_end_where_resident_ones_do(tmp_path):
    bf16 = ["model.dtype=bfloat16", "estimator.eps=2e-2", *on(device())]
    for more in ([], bf16):
        resident, _ = trained(tmp_path, f"resident{len(more)}", "engine=layerwise", *more, *on(device()))
        away, _ = trained(tmp_path, f"away{len(more)}", "engine=offload", *more, *on(device()))
        assert all(torch.equal(away[key], weight) for key, weight in resident.items())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_lora_on_few_bits(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'zoft[quant]'")
    runs.model_folder(tmp_path / "model", hidden_size=64, intermediate_size=128)
    runs.data_file(tmp_path / "data.jsonl")
    words = ["peft=lora", "peft.r=2", "trainable=adapter", f"model.quantization={kind}", "optimizer.learning_rate=1e-2"]
    first, losses = trained(tmp_path, "first", *words, *on(device()))
    again, _ = trained(tmp_path, "again", *words, *on(device()))
    assert all(0 < loss < 20 for loss in losses)
    assert any(weight.abs().max() > 0 for key, weight in first.items() if "lora_B" in key)
    assert all(torch.equal(again[key], weight) for key, weight in first.items())


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    line = [
        *runs.arguments(tmp_path, tmp_path / "killed", "budget.queries=240", "trainer.save_steps=10"),
        *on(device()),
    ]
    command = [sys.executable, "-m", "zoft", "train", *line]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=runs.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written, until = tmp_path / "killed" / journal.NAME, time.perf_counter() + 100
    while not (written.exists() and journal.read(written).end > 15):
        assert process.poll() is None, "it ended before it was killed"
        assert time.perf_counter() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "report.json").exists()
    done = runs.zoft_anew("train", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = runs.arguments(tmp_path, tmp_path / "whole", "budget.queries=240", "trainer.save_steps=10", *on(device()))
    assert run(compose(whole))["weights_sha256"] == runs.report(tmp_path / "killed")["weights_sha256"]
