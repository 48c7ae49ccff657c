"""One run, killed again and again and started again each time, against the same run left alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.injected import steps_counted
from tests.faults.zygote import Run, Zygote
from tests.runs import arguments, report
from zoft.journal import file as journal

CLIP = ["trainer.guard=clip", "trainer.guard_factor=1.5", "trainer.guard_steps=20"]
ROLLBACK = [
    "trainer.guard=rollback",
    "trainer.guard_factor=20",
    "trainer.guard_steps=20",
    "optimizer.learning_rate=2e-2",
]
BEST = ["trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=accuracy"]
BEST += ["trainer.eval_steps=10"]  # by accuracy: the best of falling losses would be the last
WORKERS = ["trainer.dataloader_num_workers=2"]

VARIANTS: dict[str, list[str]] = {
    "float32": [],
    "bfloat16": ["model.dtype=bfloat16", "estimator.eps=2e-2", "optimizer=adam"],
    "LoRA": ["peft=lora"],
    "two processes": ["trainer.per_device_train_batch_size=2"],
    "in_place": ["engine=in_place"],
    "clip": CLIP,
    "rollback": ROLLBACK,
    "best": BEST,
    "data workers": WORKERS,
    "clip, best, data workers": [*CLIP, *BEST, *WORKERS],
    "rollback, best": [*ROLLBACK, *BEST],
    "mezo_svrg": ["method=mezo_svrg", "estimator.anchor_batches=2"],
    "two processes, zoft": ["trainer.per_device_train_batch_size=2", "method=zoft"],
    "two processes, grzo, clip": ["trainer.per_device_train_batch_size=2", "method=grzo", *CLIP],
}
"""What differs from the plain run."""
QUERIES = {"mezo_svrg": 4}
"""Forward passes a step, on the mean, where they are not two: an anchor over two batches, then a step of four."""


@dataclass
class Outcome:
    """What became of a run that was killed."""

    kills: int = 0
    failed: int = 0  # starts after a kill that did not go on
    lost: int = 0  # the most steps that were written and were not there after a kill
    same: bool = False  # whether the last weights are those of the run left alone
    steps: int = 0
    expected: str = ""  # the hash of the last weights of the run left alone

    def __str__(self) -> str:
        what = "equal" if self.same else "DIFFERENT"
        return f"{self.kills} kills, {self.failed} failed resumes, {self.lost} steps lost, SHA-256 {what}"


def words(folder: Path, name: str, steps: int, variant: str = "float32", *more: str) -> list[str]:
    """The command line of a run of so many steps, with a snapshot every tenth."""
    return arguments(
        folder,
        folder / name,
        f"budget.queries={QUERIES.get(variant, 2) * steps}",
        "optimizer.learning_rate=1e-4" if variant == "bfloat16" else "optimizer.learning_rate=1e-3",
        "trainer.save_steps=10",
        "trainer.eval_steps=50",
        "trainer.save_total_limit=2",
        "trainer.lr_scheduler_type=linear",
        "trainer.journal_hash_steps=25",
        *VARIANTS[variant],
        *more,
    )


def whole(zygote: Zygote, folder: Path, steps: int, variant: str = "float32", *more: str) -> str:
    """The hash of the last weights of the run left alone."""
    runs = started(zygote, words(folder, "whole", steps, variant, *more), folder / "whole.txt", variant)
    codes = [run.wait() for run in runs]
    assert not any(codes), runs[codes.index(max(codes))].output()[-3000:]
    return str(report(folder / "whole")["weights_sha256"])


def started(zygote: Zygote, line: list[str], log: Path, variant: str, **given: Any) -> list[Run]:
    """The process or processes of a run."""
    return (
        zygote.ranks(line, log, 2, **given) if variant.startswith("two processes") else [zygote.run(line, log, **given)]
    )


def kill_at_random(zygote: Zygote, folder: Path, variant: str, *, steps: int, kills: int, seed: int = 0) -> Outcome:
    """Kill a run (one of its two processes) so often at random moments, from its start to its end."""
    outcome, generator = Outcome(steps=steps, expected=whole(zygote, folder, steps, variant)), random.Random(seed)
    line, place, counter = words(folder, "killed", steps, variant), folder / "killed", folder / "counter"
    while True:
        runs = started(zygote, line, folder / "killed.txt", variant, faults={"count_steps": {"file": str(counter)}})
        if outcome.kills < kills:
            done = steps_counted(counter)
            mean = (steps - done) / (kills - outcome.kills)
            target = min(done + int(generator.uniform(0, 2 * mean)), steps - 1)
            one = runs[generator.randrange(len(runs))]
            _wait_for(one, counter, target, generator)
            one.kill()
            _as_torchrun_would([run for run in runs if run is not one])
        codes = [run.wait() for run in runs]
        if any(code == -9 for code in codes):
            outcome.kills += 1
            path = place / journal.NAME
            known = journal.read(path).end if path.exists() else 0
            outcome.lost = max(outcome.lost, steps_counted(counter) - known)
        elif any(codes):
            outcome.failed += 1
            raise AssertionError("\n".join(run.output()[-3000:] for run in runs))
        elif (
            outcome.kills < kills
        ):  # it ended before its signal came: a run from the start takes the kills that are left
            shutil.rmtree(place)
            counter.unlink(missing_ok=True)
        else:
            break
    outcome.same = report(place)["weights_sha256"] == outcome.expected
    shutil.rmtree(place)
    shutil.rmtree(folder / "whole")
    return outcome


def _as_torchrun_would(others: list[Run]) -> None:
    """One process has died: the others see its connections close, and those that have none yet are terminated."""
    until = time.perf_counter() + 2
    while time.perf_counter() < until and any(run.poll() is None for run in others):
        time.sleep(0.01)
    for run in others:
        run.kill(signal.SIGTERM)


def _wait_for(run: Run, counter: Path, target: int, generator: random.Random) -> None:
    """Until the run has come so far, and then some part of a step; now and then a moment before its first step."""
    if generator.random() < 0.1:
        time.sleep(generator.uniform(0.0, 1.0))
        return
    while run.poll() is None and steps_counted(counter) <= target:
        time.sleep(0.002)
    time.sleep(generator.uniform(0.0, 0.06))
