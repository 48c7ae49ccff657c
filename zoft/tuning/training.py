"""One training job of a search: a point becomes a `zoft train` run in a folder of its own, and a metric of its log."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from zoft.blackbox.tune.evaluation import DONE, FAILED, STOPPED, Job, Outcome
from zoft.blackbox.tune.parameters import written
from zoft.blackbox.tune.space import Values
from zoft.errors import UserError


@dataclass
class Training:
    """A job that is a training run; it evaluates at half and at the end, whatever ``trainer.eval_steps`` says.

    Args:
        arguments: of ``zoft train``, without those of the point.
        output_dir: of the search; a job's folder in it is its number.
        metric: that is logged.
        sign: -1 where more of it is better.
        seed: of the first repeat; the others count up.
        repeats: of each point.
    """

    arguments: list[str]
    output_dir: str
    metric: str
    sign: float = 1.0
    seed: int = 0
    repeats: int = 1

    def __call__(self, job: Job) -> Outcome:
        """Train, and read the metric from the run's own log; whatever goes wrong in the run is the point's failure."""
        began, folder = time.monotonic(), self.folder(job.number, job.repeat)
        outcome = Outcome(FAILED)
        try:
            Path(self.output_dir).mkdir(parents=True, exist_ok=True)
            log = Path(f"{folder}.log")
            with (
                log.open("a", encoding="utf-8") as file,
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

    def _train(self, job: Job, folder: str) -> Outcome:
        from zoft.config import compose
        from zoft.run import run
        from zoft.tuning.watch import HalfWayError, Watch, read

        watch = Watch(self.metric, job.limit, self.sign)
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
        return Outcome(status, half if status == STOPPED else value, half)


class NeverLoggedError(UserError):
    """The metric is not among what a job logs: no other job will do better."""


def overrides(values: Values) -> list[str]:
    """A point as arguments of ``zoft train``."""
    return [f"{name}={written(value)}" for name, value in values.items()]
