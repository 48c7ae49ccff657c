"""Real processes, killed, signalled, and on a full disk: a cut of ``make faults``."""

from __future__ import annotations

from pathlib import Path

from tests.faults import kills, processes
from tests.faults.zygote import shared


def test_killed_at_random_and_asked_to_stop(tmp_path: Path):
    """Two SIGKILLs; a SIGTERM in a long step: the same command each time ends as the run that was left alone."""
    outcome = kills.kill_at_random(shared(), tmp_path, "float32", steps=16, kills=2)
    assert (outcome.kills, outcome.failed, outcome.same) == (2, 0, True)
    assert outcome.lost <= 1
    (tmp_path / "counter").unlink()
    name = "SIGTERM in a step of a minute"
    code, seconds = processes.signals(shared(), tmp_path, [name], outcome.expected)[name]
    assert code == 75
    assert seconds < 5
