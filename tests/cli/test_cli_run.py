"""`python -m zoft train` as a user starts it: exit codes, one sentence on stderr, Ctrl-C, and no file anywhere else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import zygote
from tests.faults.zygote import Run
from tests.runs import arguments, environment, report, zoft_anew
from zoft.cli import main
from zoft.config import compose
from zoft.run.train import run


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_run_writes_to_its_folder_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """MeZO's own noise on the way, so that it is reached from the command line too."""
    words = arguments(tmp_path, "runs/mine", "estimator.noise=torch_sequential")
    for name in ("cwd", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for name in ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    inputs = {name: listing(tmp_path / name) for name in ("model",)}
    done = zoft_anew("train", *words, cwd=tmp_path / "cwd")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "data.jsonl", "home", "model", "tmp"]
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "cwd" / "runs").iterdir()] == ["mine"]
    assert listing(tmp_path / "tmp") == []
    assert [
        path for path in listing(tmp_path / "home") if "matplotlib" not in path and path not in (".cache", ".config")
    ] == []
    assert {name: listing(tmp_path / name) for name in inputs} == inputs
    facts = report(tmp_path / "cwd" / "runs" / "mine")
    assert (facts["num_queries"], facts["num_steps"]) == (24, 12)
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    # Again: the finished run is shown, and the folder stays as it is.
    before = listing(tmp_path / "cwd")
    monkeypatch.chdir(tmp_path / "cwd")
    assert main(["train", *words]) == 0
    assert "finished" in "".join(capsys.readouterr())
    assert listing(tmp_path / "cwd") == before


def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "cwd").mkdir()
    words = arguments(tmp_path, "runs/mine", "task.train=nowhere.jsonl")
    monkeypatch.chdir(tmp_path / "cwd")
    capsys.readouterr()
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("zoft: error: there is no data file nowhere.jsonl")
    assert len(said.splitlines()) == 1
    assert listing(tmp_path / "cwd") == []


def test_losses_that_are_not_finite_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A model file with one weight that is not a number."""
    import torch
    from safetensors.torch import load_file, save_file

    words = arguments(tmp_path, "out")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][5] = torch.nan  # every logit needs it; a row of the head only its own token's
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("zoft: error: the loss was not finite in 10 steps in a row"), said
    assert "Traceback" not in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["num_skipped_steps"] for row in rows] == [2, 4, 6, 8]
    assert [row["loss"] for row in rows] == [None] * 4
    assert not (tmp_path / "out" / "report.json").exists()


def started(tmp_path: Path, *more: str) -> Run:
    """A run in a process of its own, which has loaded what it needs."""
    line = ["train", *arguments(tmp_path, "out", *more)]
    return zygote.shared().start(line, tmp_path / "told", errors=tmp_path / "errors", cwd=str(tmp_path))


def wait_for(condition: Callable[[], object], poll: Callable[[], int | None]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and poll() is None and not condition():
        time.sleep(0.005)


def test_a_scheduler_that_stops_a_run_before_its_first_step_is_asked_for_another_start(tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "zoft", "train", *arguments(tmp_path, "out")],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((tmp_path / "out" / "config.yaml").is_file, process.poll)  # the folder is taken, the model is being loaded
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-3000:]
    assert errors.splitlines()[-1] == "zoft: stopped by a signal; the same command goes on"
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "journal.bin").exists()


def test_signals_that_follow_each_other_end_with_the_code_for_another_start(tmp_path: Path):
    """Whatever the process is doing by then: the step, saving, leaving."""
    process = started(tmp_path, "budget.queries=3000", "trainer.eval_strategy='no'", "trainer.logging_steps=1")
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size, process.poll)
    while process.poll() is None:
        process.kill(signal.SIGTERM)
        time.sleep(0.02)
    errors = (tmp_path / "errors").read_text()
    assert process.wait() == 75, errors[-3000:]
    assert "Traceback" not in errors


def test_ctrl_c_and_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    more = ("budget.queries=300", "trainer.eval_strategy='no'", "trainer.save_steps=1000", "trainer.logging_steps=1")
    words, process = arguments(tmp_path, "out", *more), started(tmp_path, *more)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size, process.poll)
    process.kill(signal.SIGINT)
    code, output, errors = process.wait(), process.output(), (tmp_path / "errors").read_text()
    assert code == 130, errors[-3000:]
    assert errors.splitlines()[-1] == "zoft: interrupted"
    assert "Traceback" not in errors
    assert "the same command goes on from there" in output + errors
    assert not (tmp_path / "out" / "report.json").exists()
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert 1 <= int(checkpoint.name.removeprefix("checkpoint-")) < 150
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 0  # in another process than the one that began
    whole = run(compose(arguments(tmp_path, tmp_path / "whole", *more)))
    facts = report(tmp_path / "out")
    for key in ("weights_sha256", "final", "num_queries", "num_tokens", "num_steps"):
        assert facts[key] == whole[key], key
