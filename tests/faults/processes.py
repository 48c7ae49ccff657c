"""Faults that need processes: death inside a save or a query, signals, full disks, ranks that hang, long runs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.attacks import SECRETS, leaks
from tests.faults.injected import steps_counted
from tests.faults.kills import Outcome, started, whole, words
from tests.faults.zygote import Run, Zygote
from tests.runs import report
from zoft.journal import file as journal
from zoft.journal import snapshot


def _ends(run: Run, *codes: int) -> Run:
    code = run.wait()
    assert code in (codes or (0,)), f"exit code {code}: {run.output()[-2000:]}"
    return run


# ---- death -----------------------------------------------------------------------------------------------------------


def die_in_saves(zygote: Zygote, folder: Path, every: int = 1) -> tuple[int, int]:
    """Die at (every ``every``-th) call that a save makes of the disk: (points in a save, deaths that were resumed)."""
    steps, died = 24, 0
    expected, points_file = whole(zygote, folder, steps), folder / "points"
    line = words(folder, "killed", steps)
    for count in range(0, 10_000, every):
        faults = {"die_in_save": {"count": count, "told": str(points_file), "save": 2}}
        if _ends(zygote.run(line, folder / "killed.txt", faults=faults), 0, -9).code == 0:
            break
        died += 1
        assert snapshot.newest(folder / "killed") is not None
        _ends(zygote.run(line, folder / "killed.txt"))
        assert report(folder / "killed")["weights_sha256"] == expected
        shutil.rmtree(folder / "killed")
    return int(points_file.read_text()), died


def die_in_queries(zygote: Zygote, folder: Path, kills: int, steps: int = 60, seed: int = 0) -> Outcome:
    """Die inside forward passes of perturbed weights, one run of ``engine=in_place``."""
    expected, outcome, generator = whole(zygote, folder, steps, "in_place"), Outcome(), random.Random(seed)
    line, moved = words(folder, "killed", steps, "in_place"), folder / "moved"
    counter = folder / "counter"
    while True:
        faults: dict[str, Any] = {"count_steps": {"file": str(counter)}}
        if outcome.kills < kills:
            left = 2 * (steps - steps_counted(counter)) // (kills - outcome.kills)
            faults["die_in_query"] = {"count": generator.randint(1, max(1, left)), "told": str(moved)}
        code = _ends(zygote.run(line, folder / "killed.txt", faults=faults), 0, -9).code
        if code == 0:
            break
        assert moved.read_text() == "moved"
        moved.unlink()
        outcome.kills += 1
        outcome.lost = max(outcome.lost, steps_counted(counter) - journal.read(folder / "killed" / journal.NAME).end)
    outcome.same = report(folder / "killed")["weights_sha256"] == expected
    return outcome


# ---- signals ---------------------------------------------------------------------------------------------------------


SIGNALS: dict[str, tuple[list[int], float, int]] = {
    "SIGTERM": ([signal.SIGTERM], 0.0, 75),
    "SIGUSR1": ([signal.SIGUSR1], 0.0, 75),
    "SIGTERM in a step of a minute": ([signal.SIGTERM], 60.0, 75),
    "a second SIGTERM": ([signal.SIGTERM, signal.SIGTERM], 60.0, 75),
    "SIGINT": ([signal.SIGINT], 0.0, 130),
}
"""What is sent in the middle of a step, how many seconds the step takes, and the exit code."""


def signals(zygote: Zygote, folder: Path, only: list[str], expected: str | None = None) -> dict[str, tuple[int, float]]:
    """Each signal in the middle of a step: name -> (exit code, seconds until it has left); each run then goes on."""
    count, exits = 16, {}
    expected, counter = expected or whole(zygote, folder, count), folder / "counter"
    for name in only:
        numbers, seconds, code = SIGNALS[name]
        faults = {
            "count_steps": {"file": str(counter)},
            "signal_in_query": {"step": 5, "numbers": [int(n) for n in numbers], "seconds": seconds},
        }
        run = zygote.run(words(folder, "stopped", count), folder / "stopped.txt", faults=faults)
        while steps_counted(counter) < 5 and run.poll() is None:
            time.sleep(0.002)
        began = time.perf_counter()
        _ends(run, code)
        exits[name] = (code, time.perf_counter() - began)
        assert exits[name][1] < 5, exits
        assert "Traceback" not in run.output()
        _ends(zygote.run(words(folder, "stopped", count), folder / "again.txt"))
        assert report(folder / "stopped")["weights_sha256"] == expected
        shutil.rmtree(folder / "stopped")
        counter.unlink()
    return exits


# ---- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path | None]:
    """A disk of so many bytes; None where this user may mount none."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disks(zygote: Zygote, folder: Path, sizes: int) -> tuple[int, int, int]:
    """Runs on disks of so many sizes, too small: how many ended in a sentence, went on, and said the bytes wanted."""
    steps = 30
    expected = whole(zygote, folder, steps)
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in (folder / "whole").rglob("*") if path.is_file())
    refused = resumed = mentions = 0
    for number in range(sizes):
        size = int(needed * (number + 0.5) / sizes) // 4096 * 4096 + 4096
        with small_disk(folder / "disk", size) as disk:
            assert disk is not None, "mounting is not allowed here"
            line = words(folder / "disk" / "..", "disk/run", steps)
            run = _ends(zygote.run(line, folder / "full.txt"), 2, 0)
            if run.code == 0:  # room enough after all: an older snapshot had been removed
                continue
            said = run.output().strip().splitlines()[-1]
            assert said.startswith("zoft: error:"), run.output()[-2000:]
            assert "bytes are free" in said or "are free." in said or "No space left" in said, said
            mentions += "bytes are wanted" in said
            assert "Traceback" not in run.output()
            refused += 1
            for checkpoint in snapshot.checkpoints(disk / "run"):
                snapshot.verify(checkpoint)
            subprocess.run(["mount", "-o", f"remount,size={8 * needed}", str(disk)], check=True)
            _ends(zygote.run(line, folder / "full.txt"))
            assert report(disk / "run")["weights_sha256"] == expected
            resumed += 1
        (folder / "full.txt").unlink()
    return refused, resumed, mentions


def folder_goes_away(zygote: Zygote, folder: Path) -> str:
    """The run's folder is taken away under it: what it says."""
    counter = folder / "counter"
    run = zygote.run(words(folder, "gone", 200), folder / "gone.txt", faults={"count_steps": {"file": str(counter)}})
    while steps_counted(counter) < 12 and run.poll() is None:
        time.sleep(0.01)
    (folder / "gone").rename(folder / "elsewhere")
    _ends(run, 2)
    assert "Traceback" not in run.output()
    return run.output().strip().splitlines()[-1]


# ---- several processes -----------------------------------------------------------------------------------------------


def one_folder(zygote: Zygote, folder: Path) -> None:
    """Two processes and one folder: the second is refused; a killed one's lock does not count."""
    counter = folder / "counter"
    line = words(folder, "shared", 40)
    first = zygote.run(line, folder / "first.txt", faults={"count_steps": {"file": str(counter)}})
    while steps_counted(counter) < 3 and first.poll() is None:
        time.sleep(0.002)
    first.kill(signal.SIGSTOP)
    second = _ends(zygote.run(line, folder / "second.txt"), 2)
    assert f"is in use by process {first.pid}" in second.output()
    first.kill()
    first.wait()
    assert (folder / "shared" / ".lock").exists()
    _ends(zygote.run(line, folder / "third.txt"))
    assert not (folder / "shared" / ".lock").exists()


def a_rank_hangs(zygote: Zygote, folder: Path, seconds: int) -> tuple[int, float]:
    """One of two processes stops without dying: (exit code, seconds) of the other, which waits so long at most."""
    counter = folder / "counter"
    line = words(folder, "hung", 200, "two processes", f"trainer.ddp_timeout={seconds}")
    runs = started(zygote, line, folder / "hung.txt", "two processes", faults={"count_steps": {"file": str(counter)}})
    while steps_counted(counter) < 5 and runs[0].poll() is None:
        time.sleep(0.01)
    os.kill(runs[1].pid, signal.SIGSTOP)
    began = time.perf_counter()
    code = runs[0].wait(120)
    took = time.perf_counter() - began
    runs[1].kill()
    runs[1].wait()
    assert code != 0
    return code, took


def ranks_agree(zygote: Zygote, folder: Path, counts: tuple[int, ...] = (1, 2, 4)) -> tuple[float, float]:
    """A run of two processes, killed, resumed on other numbers of them.

    Returns the largest difference of the first slope that is measured anew, and of any of the steps after it.
    """
    steps, counter, slopes = 40, folder / "counter", []
    faults = {"count_steps": {"file": str(counter)}}
    line = words(folder, "before", steps, "float32", "estimator.eps=1e-1")
    runs = zygote.ranks([*line, "trainer.per_device_train_batch_size=4"], folder / "before.txt", 2, faults=faults)
    while steps_counted(counter) < 25 and runs[0].poll() is None:
        time.sleep(0.005)
    for run in runs:
        run.kill()
        run.wait()
    first = journal.read(folder / "before" / journal.NAME).end
    for count in counts:
        shutil.copytree(folder / "before", folder / f"on-{count}")
        line = words(folder, f"on-{count}", steps, "float32", "estimator.eps=1e-1")
        line.append(f"trainer.per_device_train_batch_size={8 // count}")
        log = folder / f"on-{count}.txt"
        for run in zygote.ranks(line, log, count) if count > 1 else [zygote.run(line, log)]:
            _ends(run)
        records = journal.read(folder / f"on-{count}" / journal.NAME).records
        assert len(records) == steps
        slopes.append([record.coefficients[0] for record in records])
    apart = [max(abs(a - b) for one in slopes for a, b in [(slopes[0][i], one[i])]) for i in range(steps)]
    assert max(apart[:first]) == 0
    return apart[first], max(apart)


def a_bit_flips(zygote: Zygote, folder: Path, every: int = 10) -> int:
    """A bit of one weight of one of two processes: after how many steps it is found."""
    line = words(folder, "flipped", 40, "two processes", f"trainer.journal_hash_steps={every}")
    faults = {"flip_weight": {"rank": 1, "step": 13}}
    runs = started(zygote, line, folder / "flipped.txt", "two processes", faults=faults)
    for run in runs:
        _ends(run, 1)
    said = runs[0].output()
    assert "the processes' weights differ after step 20" in said, said[-2000:]
    return 20 - 13


# ---- what stays in ---------------------------------------------------------------------------------------------------


def secrets(zygote: Zygote, folder: Path, *more: str) -> int:
    """Tokens in the environment: files looked through, the output among them, in which none was found."""
    _ends(zygote.run(words(folder, "run", 12, "float32", *more), folder / "said.txt", **SECRETS))
    assert not leaks(folder), leaks(folder)
    return sum(path.is_file() for path in folder.rglob("*"))


def soak(zygote: Zygote, folder: Path, steps: int) -> tuple[float, int, int]:
    """(growth of resident memory from the first tenth to the end, open files then, and at the end)."""
    more = ("trainer.logging_steps=100", "trainer.save_steps=1000", "trainer.eval_strategy='no'")
    faults = {"report_memory": {"file": str(folder / "memory"), "every": steps // 10}}
    line = words(folder, "soak", steps, "float32", *more)
    _ends_after(zygote.run(line, folder / "soak.txt", faults=faults), 3000)
    rows = [[int(x) for x in row.split()] for row in (folder / "memory").read_text().splitlines()]
    return rows[-1][1] / rows[0][1] - 1, rows[0][2], rows[-1][2]


def _ends_after(run: Run, seconds: float) -> None:
    code = run.wait(seconds)
    assert code == 0, run.output()[-2000:]


def dead_tracker(zygote: Zygote, folder: Path) -> None:
    """No hub, and a tracker whose server is gone: the run completes, and says so once."""
    gone = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "10"}
    run = zygote.run(words(folder, "run", 12, "float32", "tracker=wandb"), folder / "said.txt", **gone)
    _ends_after(run, 300)
    notes = [line for line in run.output().splitlines() if line.startswith("zoft: note: the tracker")]
    assert len(notes) == 1, run.output()[-2000:]
    assert report(folder / "run")["num_steps"] == 12
