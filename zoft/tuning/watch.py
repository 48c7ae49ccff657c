"""What a search sees of a training job: the metric at half and at the end, and the end of a job that is bad at half."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.report.metrics import read_metrics


class HalfWayError(Exception):
    """The job is worse at half than the limit; what it has done is in its folder, and `zoft train` would go on."""


class Watch(TrainerCallback):
    """Asks for an evaluation at half of the steps and at the end, and ends the job at half if it is beyond the limit.

    Args:
        metric: as it is logged.
        limit: of the metric at half; None for none.
        sign: -1 where more of it is better.
    """

    def __init__(self, metric: str, limit: float | None, sign: float) -> None:
        self.metric, self.limit, self.sign = metric, limit, sign
        self.steps: int | None = None  # of the whole job, once it has begun

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Learn how long it is."""
        self.steps = state.max_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for it."""
        if state.global_step in (half_of(state.max_steps), state.max_steps):
            control.should_evaluate = control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Judge it."""
        at_half = half_of(state.max_steps) == state.global_step < state.max_steps
        if self.limit is None or not logs or self.metric not in logs or not at_half:
            return
        value = float(logs[self.metric])
        if math.isnan(value) or self.sign * value > self.sign * self.limit:
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
