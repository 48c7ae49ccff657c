"""torchrun --max-restarts: a rank dies, all are started anew, and the run goes on from its journal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import arguments, environment, report
from zoft.config import compose
from zoft.journal import file as journal
from zoft.run.train import run
from zoft.trainer.restarts import meeting

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = 30


def steps_in(folder: Path) -> int:
    """Steps that the run's journal knows."""
    path = folder / journal.NAME
    return len(journal.read(path).records) if path.is_file() and path.stat().st_size else 0


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes that torchrun has started, by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rank_is_killed_twice_and_the_run_goes_on(tmp_path: Path):
    words = [f"budget.queries={2 * STEPS}", "trainer.journal_hash_steps=5", "trainer.parallel=directions"]
    output = tmp_path / "told.txt"
    with output.open("w") as file:
        command = [*TORCHRUN, "--max-restarts", "2", "-m", "zoft", "train"]
        command += arguments(tmp_path, tmp_path / "killed", *words)
        ranks = subprocess.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
        for number, step in enumerate((STEPS // 3, 2 * STEPS // 3)):
            while steps_in(tmp_path / "killed") < step:
                assert ranks.poll() is None, output.read_text()[-3000:]
                time.sleep(0.02)
            os.kill(ranks_of(ranks)[1 - number].pid, signal.SIGKILL)
        assert ranks.wait(600) == 0, output.read_text()[-3000:]
    finally:
        ranks.terminate()  # torchrun ends what it has started
        ranks.wait(60)
    assert output.read_text().count(" steps are known") == 2
    alone = run(compose(arguments(tmp_path, tmp_path / "alone", *words)))
    for same in ("weights_sha256", "num_steps", "num_queries", "num_tokens"):
        assert report(tmp_path / "killed")[same] == alone[same]


def test_a_first_attempt_and_a_store_of_its_own_need_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert list(meeting(60)) == ["timeout"]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert list(meeting(60)) == ["timeout"]


def test_several_machines_are_told_what_torchrun_needs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for name, value in (("USE_AGENT_STORE", "True"), ("RESTART_COUNT", "1"), ("MAX_RESTARTS", "3")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert list(meeting(60)) == ["timeout"]
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun" in caplog.text
