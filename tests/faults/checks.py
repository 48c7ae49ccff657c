"""The list: every fault with its pass line, and what carries it out in full (scripts/faults.py)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.faults import damage, kills
from tests.faults.zygote import Zygote
from tests.runs import REPOSITORY, environment


class Place:
    """Where a check works: a folder of its own, and a process that runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def zygote(self) -> Zygote:
        """Started when it is first asked for."""
        return Zygote()

    def close(self) -> None:
        """End what was started."""
        if "zygote" in self.__dict__:
            self.zygote.close()


@dataclass
class Check:
    """A line of the table."""

    fault: str
    pass_line: str
    carry_out: Callable[[Place], str]


CHECKS: dict[str, Check] = {}


def check(number: str, fault: str, pass_line: str) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
    """Add a function to the list; it gives the figure that was reached, and raises where that is not enough."""

    def add(function: Callable[[Place], str]) -> Callable[[Place], str]:
        CHECKS[number] = Check(fault, pass_line, function)
        return function

    return add


def tests(*names: str) -> str:
    """Tests of the default suite that show a line: run them, and say how many passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1500, check=False
    )
    found = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert found is not None
    files = sorted({f"`{name.split('::')[0]}`" for name in names})
    return f"{found.group(1)} tests pass ({', '.join(files)})"


# ---- crash and resume ------------------------------------------------------------------------------------------------

KILLED = "0 failed resumes, ≤ 1 step lost, SHA-256 of the last weights equal"


def _killed(variant: str) -> Callable[[Place], str]:
    def carry_out(place: Place) -> str:
        outcome = kills.kill_at_random(place.zygote, place.folder, variant, steps=200, kills=100)
        assert outcome.same, str(outcome)
        assert outcome.failed == 0, str(outcome)
        assert outcome.lost <= 1, str(outcome)
        return str(outcome)

    return carry_out


check("1a", "100 SIGKILLs at random in one run of 200 steps, float32", KILLED)(_killed("float32"))
check("1b", "the same, bfloat16 with Adam", KILLED)(_killed("bfloat16"))
check("1c", "the same, LoRA", KILLED)(_killed("LoRA"))
check("1d", "the same, one of two processes (gloo) each time", KILLED)(_killed("two processes"))


@check("9", "200 single flipped bits, over all files of a snapshot", "200 noticed, the snapshot before it used")
def _(place: Place) -> str:
    damaged = damage.Damaged(place.folder / "run")
    count = damage.flip_bits(damaged, 200, resumes=9)
    return f"{count} noticed by the file's name; of these, 9 resumes carried out, SHA-256 equal"
