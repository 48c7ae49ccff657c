"""Two processes are one: the same weights on both, and the trajectory of one process on the union batch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import zygote
from tests.invariant import in_processes
from tests.runs import arguments, environment, report
from zoft.config import compose
from zoft.run.train import run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *words], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    zygote.shared().program("tests.invariant.in_processes", folder)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", in_processes.CASES)
def test_both_processes_hold_the_same_weights(case: str, two: tuple[Path, list[dict[str, Any]]]):
    first, second = (rank[case] for rank in two[1])
    assert first["num_processes"] == second["num_processes"] == 2
    assert first["digest"] == second["digest"]
    assert first["eval_loss"] == second["eval_loss"]
    assert first["num_tokens"] == second["num_tokens"]


# A basis from activations is made of those of the first process: with one process, of the whole batch's.
@pytest.mark.parametrize(
    "case", [case for case in in_processes.CASES if case not in ("stopped", "nan_on_one", "activation")]
)
def test_one_process_on_the_union_batch(case: str, two: tuple[Path, list[dict[str, Any]]], tmp_path: Path):
    folder, (results, _) = two
    plain = "full" if case == "resumed" else case
    alone = in_processes.train(plain, tmp_path, rank=0, world=1)
    assert alone["num_processes"] == 1
    assert results[case]["steps"] == alone["steps"] == in_processes.STEPS
    assert results[case]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    # The Trainer's evaluation weighs tokens within what the processes read together.
    if case not in ("unequal_tokens", "stream_accumulated"):
        assert results[case]["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)
    assert results[case]["num_queries"] == alone["num_queries"]
    assert results[case]["num_tokens"] == alone["num_tokens"]
    ours, theirs = torch.load(folder / f"{case}-0.pt"), torch.load(tmp_path / f"{plain}-0.pt")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


def test_a_bad_loss_on_one_process_is_a_bad_step_on_both(two: tuple[Path, list[dict[str, Any]]]):
    for rank in two[1]:
        assert rank["nan_on_one"]["num_skipped"] == 1
        assert [math.isnan(loss) for loss in rank["nan_on_one"]["losses"]] == [i == 2 for i in range(6)]


def test_a_signal_to_one_process_stops_both_at_one_step(two: tuple[Path, list[dict[str, Any]]]):
    folder, ranks = two
    assert [t["stopped"]["steps"] for t in ranks] == [3, 3]
    assert (folder / "stopped" / "checkpoint-3").is_dir()
    for rank in ranks:
        assert rank["resumed"]["digest"] == rank["full"]["digest"]
        assert rank["resumed"]["losses"] == rank["full"]["losses"]


def test_weights_are_sent_where_they_differ(two: tuple[Path, list[dict[str, Any]]]):
    for shared in (rank["shared"] for rank in two[1]):
        assert shared["equal"] == shared["again"] == 0
        assert shared["one_differs"] == shared["bytes_of_one"] > 0
        assert shared["another_model"].startswith("process 1 has another model than process 0")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("config", "process 1 has other config than process 0 (seed: 1; there seed: 0): start every process with"),
        ("settings", "process 1 has other settings than process 0 (learning_rate: 0.002; there learning_rate: 0.001):"),
        ("code", "process 1 has other code than process 0 (torch 2.1; there torch 2.0): install the same versions"),
    ],
)
def test_a_process_with_something_else_is_refused(what: str, sentence: str, two: tuple[Path, list[dict[str, Any]]]):
    folder, ranks = two
    assert [rank["refused"][what][: len(sentence)] for rank in ranks] == [sentence, sentence]
    assert not (folder / "other").exists()  # nothing was claimed or loaded


def test_a_run_under_torchrun_has_one_folder(tmp_path: Path):
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = torchrun("-m", "zoft", "train", *arguments(tmp_path, "out"), cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in cwd.iterdir()] == ["out"]
    facts = report(cwd / "out")
    alone = run(compose(arguments(tmp_path, tmp_path / "alone", "trainer.per_device_train_batch_size=8")))
    assert (facts["num_steps"], facts["num_queries"]) == (12, 24)
    assert facts["num_tokens"] == alone["num_tokens"]
    assert facts["zero_shot"] == alone["zero_shot"]
    lines = [json.loads(line) for line in (cwd / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    theirs = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in theirs], abs=1e-4)
    assert done.stdout.count("zero-shot held-out") + done.stderr.count("zero-shot held-out") == 1
    # The same command shows the finished run; another one in its folder is refused, by one sentence and not two.
    other = arguments(tmp_path, cwd / "out", "seed=1")
    again = zygote.shared().ranks(other, tmp_path / "again")
    assert [process.wait() for process in again] == [2, 2]
    assert "".join(process.output() for process in again).count("holds another run") == 1
    assert report(cwd / "out") == facts
