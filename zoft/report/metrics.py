"""metrics.csv and metrics.jsonl: one row a log step, flushed, and never repeated by a resumed run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.report.results import METRICS, read_metrics
from zoft.report.text import finite
from zoft.utils.rows import RowFile, csv_line, json_line

CSV = "metrics.csv"

COLUMNS = (
    "step",
    "queries",  # forward passes of the objective so far, clean ones too
    "tokens",  # tokens those passes read
    "loss",
    "projected_grad",  # root mean square over the directions
    "learning_rate",
    "eps",
    "seconds",  # since the start of training, over all resumes
    "seconds_forward",
    "seconds_other",
    "peak_memory_mb",  # MiB
    "eval_loss",
    "eval_accuracy",
    "num_skipped_steps",
)
"""The columns of metrics.csv, in order; one more follows when `metric_for_best_model` names another metric."""

_RENAMED = {"num_queries": "queries", "num_tokens": "tokens"}
_SUMMARY = "train_runtime"  # the Trainer's closing row: totals, which belong in the report and not on a curve


class MetricsCallback(TrainerCallback):
    """Writes metrics.csv and metrics.jsonl into `args.output_dir`, on world process zero.

    A training row and an evaluation row of the same step are one row; of two values for one cell the first stays
    (an evaluation repeated after `load_best_model_at_end` is of other weights: it belongs in the report). Every row
    is on disk before the next step. metrics.jsonl holds every logged number; metrics.csv the fixed `COLUMNS`, its
    cells empty where nothing was measured. A value that is not finite is `NaN`, `inf` or `-inf` in the csv and null
    in the jsonl (JSON has no NaN), never 0. Rows logged before training begins (a zero-shot evaluation, step 0) wait
    until it does: only then is it known whether the files are new or continued.

    Args:
        known: number of steps that a resumed run takes from its journal; the rows of those stay as they are.

    Example:
        >>> MetricsCallback().columns[:3]
        ('step', 'queries', 'tokens')
    """

    def __init__(self, known: Callable[[], int] = lambda: 0) -> None:
        self.known = known
        self.columns: tuple[str, ...] = COLUMNS
        self._files: dict[str, RowFile] = {}  # none until training begins
        self._waiting: list[dict[str, Any]] = []
        self._row: dict[str, Any] = {}  # the last row written

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """New files for a fresh run; a resumed one keeps its rows up to `state.global_step`."""
        if not state.is_world_process_zero:
            return
        best = args.metric_for_best_model
        if best is not None and _prefixed(best) not in COLUMNS:
            self.columns = (*COLUMNS, _prefixed(best))
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        past = max(state.global_step, self.known())
        rows = [row for row in read_metrics(folder) if row["step"] <= past] if past else []
        self._row = {}
        # The csv is written anew from the jsonl, so that the two agree whatever an interruption left of either.
        lines = [self._encode(row) for row in rows]
        self._files = {
            CSV: RowFile(folder / CSV, [csv_line(self.columns), *(line[CSV] for line in lines)]),
            METRICS: RowFile(folder / METRICS, [line[METRICS] for line in lines]),
        }
        waiting, self._waiting = self._waiting, []
        known = {row["step"] for row in rows}
        for row in waiting:
            if row["step"] not in known:
                self._write(row)
        if rows and not self._row:
            self._row = rows[-1]

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """One row, or more cells of the last one."""
        if not logs or _SUMMARY in logs or not state.is_world_process_zero:
            return
        row = {"step": state.global_step}
        row.update({_RENAMED.get(key, key): _plain(value) for key, value in logs.items() if value is not None})
        if not self._files:
            self._waiting.append(row)
        else:
            self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if row["step"] < self._row.get("step", 0):  # replayed, and there already
            return
        same_step = row["step"] == self._row.get("step")
        if same_step:
            row = {**self._row, **{key: value for key, value in row.items() if key not in self._row}}
            if len(row) == len(self._row):
                return
        for name, line in self._encode(row).items():
            if same_step:  # the merged row has all cells of the one it takes the place of
                self._files[name].replace_last(line)
            else:
                self._files[name].add(line)
        self._row = row

    def _encode(self, row: dict[str, Any]) -> dict[str, bytes]:
        return {CSV: csv_line(_cell(row.get(key)) for key in self.columns), METRICS: json_line(finite(row))}


def _prefixed(metric: str) -> str:
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def _plain(value: Any) -> Any:
    """A tensor's, array's or numpy scalar's Python numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _cell(value: Any) -> Any:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value
