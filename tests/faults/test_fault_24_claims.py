"""A folder is claimed by one process: what a kill in the first write leaves, and what its forks hold, is no claim."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import zygote
from tests.runs import arguments, environment, zoft
from zoft.errors import UserError
from zoft.journal.file import Journal
from zoft.run import folder
from zoft.tuning.record import StudyRecord
from zoft.tuning.space import SearchSpace
from zoft.utils.files import is_unfinished, write_atomically

DIES_IN_FIRST_WRITE = """
import os, signal, sys
from zoft.run import folder
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
folder.claim(sys.argv[1], "seed: 0\\n")
"""

DIES_WITH_A_CHILD = """
import os, signal, sys, time
from pathlib import Path
from zoft.run import folder
from zoft.tuning.record import StudyRecord
from zoft.tuning.space import SearchSpace
from zoft.journal.file import Journal
place = Path(sys.argv[1])
folder.claim(str(place), "seed: 0\\n")
journal = Journal.create(place / "journal.bin", {})
search = StudyRecord(place / "journal.jsonl", {"direction": "minimize"}, SearchSpace({"lr": "log(1e-4,1)"}))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _runs(program: str, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(place)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def test_fault_24_a_kill_in_the_first_write_leaves_a_folder_that_can_be_claimed(tmp_path: Path):
    place = tmp_path / "run"
    assert _runs(DIES_IN_FIRST_WRITE, place).returncode == -signal.SIGKILL
    assert any(is_unfinished(path.name) for path in place.iterdir())
    assert folder.claim(str(place), "seed: 0\n") == "new"
    assert sorted(path.name for path in place.iterdir()) == [".lock", "config.yaml"]
    folder.unlock(str(place))


def test_fault_24_the_loser_of_a_race_is_told_why(tmp_path: Path):
    """The winner is in its first write."""
    folder.claim(str(tmp_path), "seed: 0\n")
    (tmp_path / "config.yaml").rename(tmp_path / f".config.yaml.{os.getpid()}.new")
    done = subprocess.run(
        [sys.executable, "-c", f"from zoft.run import folder; folder.claim({str(tmp_path)!r}, 'seed: 0\\n')"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f"is in use by process {os.getpid()} on" in done.stderr
    folder.unlock(str(tmp_path))


def test_fault_24_a_fork_that_outlives_its_process_holds_no_lock(tmp_path: Path):
    begun = _runs_until_killed(tmp_path / "run")
    try:
        assert folder.claim(str(tmp_path / "run"), "seed: 0\n") == "resume"
        Journal.open(tmp_path / "run" / "journal.bin", 0).close()
        StudyRecord(
            tmp_path / "run" / "journal.jsonl", {"direction": "minimize"}, SearchSpace({"lr": "log(1e-4,1)"})
        ).close()
    finally:
        os.kill(begun, signal.SIGKILL)
        folder.unlock(str(tmp_path / "run"))


def _runs_until_killed(place: Path) -> int:
    process = subprocess.Popen(
        [sys.executable, "-c", DIES_WITH_A_CHILD, str(place)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert process.wait(60) == -signal.SIGKILL
    os.kill(child, 0)  # alive
    return child


def test_fault_24_workers_of_a_killed_run_do_not_hold_its_folder(tmp_path: Path):
    line = arguments(tmp_path, "out", "trainer.dataloader_num_workers=2", "budget.queries=200")
    process = zygote.shared().start(["train", *line], tmp_path / "told", cwd=str(tmp_path))
    journal, deadline = tmp_path / "out" / "journal.bin", time.monotonic() + 120
    while not journal.exists() or journal.stat().st_size < 2500:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    again = zoft("train", *line, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("name", [".lock", "journal.bin"])
def test_fault_25_a_link_is_not_written_through(name: str, tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    place = tmp_path / "run"
    place.mkdir()
    (place / name).symlink_to(tmp_path / "precious")
    writes = {".lock": lambda: folder.claim(str(place), "seed: 0\n"), "journal.bin": lambda: Journal(place / name)}
    with pytest.raises(UserError, match=f"{name} is a symbolic link to .*precious, which is not written to: remove"):
        writes[name]()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "journal.bin", "own.txt"])
def test_fault_25_a_file_with_another_name_is_not_written(name: str, tmp_path: Path):
    """A hard link, as a backup by `cp -al` makes them."""
    from zoft.utils.shared import open_own

    (tmp_path / "precious").write_text("mine")
    place = tmp_path / "run"
    place.mkdir()
    os.link(tmp_path / "precious", place / name)
    writes = {
        ".lock": lambda: folder.claim(str(place), "seed: 0\n"),
        "journal.bin": lambda: Journal(place / name),
        "own.txt": lambda: open_own(place / name, "w"),
    }
    with pytest.raises(UserError, match=f"{name} is a hard link"):
        writes[name]()
    assert (tmp_path / "precious").read_text() == "mine"


def test_fault_25_nor_through_one_in_the_place_of_an_unfinished_file(tmp_path: Path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}.new").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "a.json", "other")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "other"
