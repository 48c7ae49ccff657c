"""The page's fields become the command line's words; its training is a process that is stopped and goes on."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from zoft.cli import main
from zoft.errors import UserError
from zoft.use.page import commands
from zoft.use.page.commands import Fields, Running, earlier_runs, shown, state_of
from zoft.use.page.page import folder_of, require_safe


def test_fields_are_words_as_in_a_shell():
    words = Fields("classify", " zoft:m ", "mail.csv", "'task.words={0: No, 1: Yes}' seed=1", "runs/x").words()
    assert words == [
        *("config=classify", "model.name=zoft:m", "task.train=mail.csv", "task.words={0: No, 1: Yes}", "seed=1"),
        "output_dir=runs/x",
    ]
    assert Fields("", "", "", "", "").words() == []
    assert shown("train", words).startswith("zoft train config=classify model.name=zoft:m")
    with pytest.raises(UserError, match="as in a shell"):
        Fields(more="'open").words()
    assert folder_of(["config=smoke", "output_dir=runs/x"]) == Path("runs/x")
    assert folder_of(["config=absent"]) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::"])
def test_another_address_needs_a_token(host: str, capsys: Any):
    require_safe(host, "a" * 16)
    assert main(["ui", f"host={host}", "token=short"]) == 2
    assert "starts processes: give token=" in capsys.readouterr().err


def test_wrong_words_are_refused(capsys: Any):
    for words, said in ((["port=x"], "port must be"), (["config=smoke"], "not 'config=smoke'")):
        assert main(["ui", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_training_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in = "trap 'echo saved; exit 75' TERM; echo begun; while :; do sleep 0.05; done"
    monkeypatch.setattr(commands, "_command", lambda verb, words: ["bash", "-c", stand_in])
    running = Running(tmp_path / "log")
    running.start(["config=smoke"])
    with pytest.raises(UserError, match="a training is on"):
        running.start(["config=smoke"])
    while "begun" not in running.text():
        time.sleep(0.02)
    running.stop()
    assert running.process is not None
    assert running.process.wait(timeout=20) == 75
    assert running.text() == "begun\nsaved"
    assert not running.is_on
    running.start(["config=smoke"])  # the same words go on
    running.stop()
    running.process.wait(timeout=20)


def test_earlier_runs_are_offered_the_newest_first(tmp_path: Path):
    for place, name in enumerate(("old", "sweep/cell", "new")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
        os.utime(tmp_path / name, (place, place))
    (tmp_path / "empty").mkdir()
    assert [Path(run).relative_to(tmp_path).as_posix() for run in earlier_runs(tmp_path)] == [
        "new",
        "sweep/cell",
        "old",
    ]
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n')
    assert "has come to step 4: Start or go on" in state_of(str(tmp_path / "new"))
