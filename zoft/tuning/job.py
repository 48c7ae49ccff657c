"""One training job of a search: a point becomes a `zoft train` run in a folder of its own, and a metric of its log."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.errors import UserError
from zoft.report.results import read_metrics
from zoft.tuning.evaluation import DONE, FAILED, STOPPED, Job, JobOutcome
from zoft.tuning.space import Values, written
from zoft.utils import shared


@dataclass
class Training:
    """A job that is a training run; it evaluates at half and at the end, whatever ``trainer.eval_steps`` says.

    Args:
        arguments: of ``zoft train``, without those of the point.
        output_dir: of the search; a job's folder in it is its number.
        metric: that is logged.
        seed: of the first repeat; the others count up.
        repeats: of each point.
        record: the search's file, by which Optuna's pruner compares jobs at half; None to let all go on.
    """

    arguments: list[str]
    output_dir: str
    metric: str
    seed: int = 0
    repeats: int = 1
    record: str | None = None

    def __call__(self, job: Job) -> JobOutcome:
        """Train, and read the metric from the run's own log; whatever goes wrong in the run is the point's failure."""
        began, folder = time.monotonic(), self.folder(job.number, job.repeat)
        outcome = JobOutcome(FAILED)
        try:
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            log = Path(f"{folder}.log")
            with (
                shared.open_own(log, "a", encoding="utf-8") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                outcome = self._train(job, folder)
        except NeverLoggedError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            outcome.error = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        finally:
            gc.collect()  # a trainer and its model refer to each other
        outcome.seconds = time.monotonic() - began
        return outcome

    def folder(self, number: int, repeat: int) -> str:
        """Where a job runs."""
        return str(Path(self.output_dir) / (f"{number:04d}" + (f"-{repeat}" if self.repeats > 1 else "")))

    def drop_weights(self, number: int) -> None:
        """Remove what takes room; a run's journal has its weights still (`zoft replay`)."""
        for repeat in range(self.repeats):
            folder = Path(self.folder(number, repeat))
            for path in (folder / "model", *folder.glob("checkpoint-*")):
                shutil.rmtree(path, ignore_errors=True)

    def arguments_of(self, values: Values, repeat: int, folder: str) -> list[str]:
        """Those of ``zoft train`` for a point."""
        seed = [f"seed={self.seed + repeat}"] if self.repeats > 1 or repeat else []
        return [*self.arguments, *overrides(values), *seed, f"output_dir={folder}"]

    def _train(self, job: Job, folder: str) -> JobOutcome:
        from zoft.config import compose
        from zoft.run.train import run
        from zoft.tuning.job import HalfWayError, HalfWayWatch, read

        halfway = None
        if self.record is not None:
            from zoft.tuning.record import Halfway

            halfway = Halfway(self.record, job.trial_id, job.repeat)
        watch = HalfWayWatch(self.metric, halfway.is_bad if halfway else None)
        status = DONE
        try:
            run(compose(self.arguments_of(job.values, job.repeat, folder)), [watch])
        except HalfWayError:
            status = STOPPED
        half, value, names = read(folder, self.metric, watch.steps)
        if value is None:
            known = sorted(name for name in names if name != "step")
            raise NeverLoggedError(
                f"metric={self.metric} is never logged by this job, which logs {', '.join(known)}: choose one of these"
            )
        value = half if status == STOPPED else value
        if value is None or not math.isfinite(value):
            return JobOutcome(FAILED, error=f"{self.metric} is {value}")
        return JobOutcome(status, value, half)


class NeverLoggedError(UserError):
    """The metric is not among what a job logs: no other job will do better."""


def overrides(values: Values) -> list[str]:
    """A point as arguments of ``zoft train``."""
    return [f"{name}={written(value)}" for name, value in values.items()]


# ---- What a search sees of a training job: the metric at half and at the end, and the end of a job that is bad at half


class HalfWayError(Exception):
    """The job is worse at half than the median of the others; `zoft train` would go on from its folder."""


class HalfWayWatch(TrainerCallback):
    """Asks for an evaluation at half of the steps and at the end, and ends the job at half if it is a bad one.

    Args:
        metric: as it is logged.
        is_bad: the metric at half -> whether the job shall end there; None lets it go on.
    """

    def __init__(self, metric: str, is_bad: Callable[[float], bool] | None) -> None:
        self.metric, self.is_bad = metric, is_bad
        self.steps: int | None = None  # of the whole job, once it has begun

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Learn how long it is."""
        self.steps = state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for it."""
        if state.global_step in (half_of(state.max_steps), state.max_steps):
            control.should_evaluate = control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Judge it."""
        at_half = half_of(state.max_steps) == state.global_step < state.max_steps
        if self.is_bad is None or not logs or self.metric not in logs or not at_half:
            return
        if self.is_bad(float(logs[self.metric])):
            raise HalfWayError


def half_of(steps: int) -> int:
    """The step at which a job has had half of its budget."""
    return max(1, (steps + 1) // 2)


def read(folder: str, metric: str, steps: int | None) -> tuple[float | None, float | None, set[str]]:
    """(the metric at half, its last value, the names of all that is logged), from a run's log.

    Args:
        folder: of the run.
        metric: as it is logged.
        steps: of the whole job; None for a finished one.
    """
    rows = [row for row in read_metrics(folder) if row["step"]]
    half = half_of(steps or (rows[-1]["step"] if rows else 1))
    values = [(row["step"], row[metric]) for row in rows if metric in row]
    at_half = [value for step, value in values if step == half]
    return at_half[0] if at_half else None, values[-1][1] if values else None, {name for row in rows for name in row}
