"""`scripts/bench_step.py`: what it stores agrees with itself, and its baseline is MeZO."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDED = REPOSITORY / "tests" / "assets" / "mezo_trajectory"
SCRIPT = [sys.executable, str(REPOSITORY / "scripts" / "bench_step.py")]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    done = bench("--preset", "micro", "--steps", "20", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "step.json").read_text()), folder


@pytest.mark.slow
def test_every_case_is_there_with_everything(run):
    printed, result, folder = run
    cases = {(case["variant"], case["q"]): case for case in result["cases"]}
    assert set(cases) == {(variant, q) for variant in ("gaussian", "low_rank", "lora") for q in (1, 2)}
    assert not result["skipped"]
    for (variant, _), case in cases.items():
        assert f"{variant} " in printed
        assert case["engine"] in printed
        assert case["loss_difference"] < 1e-4
        assert case["queries_per_second"] > 0
        assert set(case["peak_mb"]) == {"mezo", "limit", "zoft"}
        assert all(peak >= 0 for peak in case["peak_mb"].values() if peak is not None)
    assert all(cases[variant, 1]["peak_mb"]["zoft"] is not None for variant in ("gaussian", "low_rank", "lora"))
    assert cases["lora", 1]["trained"] < cases["gaussian", 1]["trained"]
    assert {"torch", "transformers", "zoft", "cpu", "cores", "threads", "date"} <= set(result["environment"])
    assert (folder / "step.txt").read_text().strip() in printed
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ratios_are_those_of_the_rounds(run):
    for case in run[1]["cases"]:
        seconds = case["seconds"]
        assert {len(times) for times in seconds.values()} == {case["rounds"]}
        for name, times in seconds.items():
            assert case["milliseconds"][name] == pytest.approx(1000 * median(times))
        for name, above, below in (("x_mezo", "mezo", "zoft"), ("x_limit", "zoft", "limit")):
            ratios = numpy.array(seconds[above]) / numpy.array(seconds[below])
            assert case[name]["median"] == pytest.approx(float(numpy.median(ratios)))
            assert case[name]["q1"] <= case[name]["median"] <= case[name]["q3"]


@pytest.mark.slow
def test_shares_are_of_the_whole(run):
    for case in run[1]["cases"]:
        for shares in case["shares"].values():
            assert sum(shares.values()) == pytest.approx(1)
            assert all(share > 0 for share in shares.values())  # each part was found in every scheme


@pytest.mark.slow
def test_slopes_and_endurance(run):
    result = run[1]
    assert [(slope["variant"], slope["q"]) for slope in result["slopes"]] == [
        ("gaussian", 2),
        ("low_rank", 2),
        ("lora", 2),
    ]
    assert {one["engine"] for one in result["endurance"]} == {case["engine"] for case in result["cases"]}
    assert all(one["steps"] == 20 for one in result["endurance"])
    assert all(one["ratio"] == pytest.approx(one["last_ms"] / one["first_ms"]) for one in result["endurance"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so():
    done = bench("--device", "cuda")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_the_baseline_is_mezo():
    """Twenty steps give the losses and weights recorded from MeZO's own code, to another processor's last bits."""
    spec = importlib.util.spec_from_file_location("mezo_step", REPOSITORY / "scripts" / "mezo_step.py")
    mezo_step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mezo_step)
    model = AutoModelForCausalLM.from_pretrained(RECORDED / "model", dtype=torch.float32, attn_implementation="eager")
    steps = json.loads((RECORDED / "sst2_full" / "trajectory.json").read_text())["steps"]
    batches = json.loads((RECORDED / "sst2_full" / "batches.json").read_text())
    mezo = mezo_step.MezoStep(model.eval(), 1e-4, 1e-3, seeds=iter([step["seed"] for step in steps]))
    with torch.random.fork_rng(devices=[]):
        for rows, step in zip(batches, steps, strict=True):
            batch = {key: torch.tensor(value["data"]) for key, value in rows.items()}
            batch.setdefault("attention_mask", (batch["input_ids"] != 1).long())
            assert mezo.step(batch) == pytest.approx(step["l1"], abs=3e-7, rel=0)
    final = load_file(RECORDED / "sst2_full" / "final.safetensors")
    for name, tensor in mezo.tensors:
        torch.testing.assert_close(tensor.detach(), final[name], rtol=0, atol=1e-6)
