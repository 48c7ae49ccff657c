"""Real processes, killed, signalled, and on a full disk: a cut of ``make faults``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import kills, processes
from tests.faults.zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


def test_killed_at_random_and_asked_to_stop(zygote: Zygote, tmp_path: Path):
    """Two SIGKILLs; a SIGTERM in a long step: the same command each time ends as the run that was left alone."""
    outcome = kills.kill_at_random(zygote, tmp_path, "float32", steps=16, kills=2)
    assert (outcome.kills, outcome.failed, outcome.same) == (2, 0, True)
    assert outcome.lost <= 1
    (tmp_path / "counter").unlink()
    name = "SIGTERM in a step of a minute"
    code, seconds = processes.signals(zygote, tmp_path, [name], outcome.expected)[name]
    assert code == 75
    assert seconds < 5
