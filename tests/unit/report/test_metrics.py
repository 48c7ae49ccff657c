"""metrics.csv and metrics.jsonl: one row a step, resumed without repeats, never a made-up number."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from zoft.report.metrics import COLUMNS, MetricsCallback
from zoft.report.results import read_metrics


class Run:
    """A trainer as the callback sees it."""

    def __init__(self, folder: Path, *, step: int = 0, best: str | None = None, zero: bool = True) -> None:
        self.args: Any = SimpleNamespace(output_dir=str(folder), metric_for_best_model=best)
        self.state = TrainerState(global_step=step, is_world_process_zero=zero)
        self.callback = MetricsCallback()

    def begin(self, step: int = 0) -> Run:
        self.state.global_step = step
        self.callback.on_train_begin(self.args, self.state, TrainerControl())
        return self

    def log(self, step: int, **logs: Any) -> Run:
        self.state.global_step = step
        self.callback.on_log(self.args, self.state, TrainerControl(), logs=logs)
        return self


def read_csv(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_training_and_an_evaluation_of_one_step_are_one_row(tmp_path: Path) -> None:
    run = Run(tmp_path).begin()
    run.log(1, loss=0.5, num_queries=2, num_tokens=64, epoch=0.1).log(1, eval_loss=0.4, eval_accuracy=0.75, seconds=3.0)
    run.log(2, loss=0.25, num_queries=4)
    rows = read_csv(tmp_path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["queries"], row["loss"], row["eval_accuracy"]) for row in rows] == [
        ("1", "2", "0.5", "0.75"),
        ("2", "4", "0.25", ""),
    ]
    first, second = read_metrics(tmp_path)
    assert first["epoch"] == 0.1
    assert first["tokens"] == 64
    assert first["eval_loss"] == 0.4
    assert first["seconds"] == 3.0
    assert "eval_accuracy" not in second


def test_the_first_value_of_a_cell_stays(tmp_path: Path) -> None:
    Run(tmp_path).begin().log(9, eval_accuracy=0.8).log(9, eval_accuracy=0.9, eval_f1=0.7)
    (row,) = read_metrics(tmp_path)
    assert row["eval_accuracy"] == 0.8
    assert row["eval_f1"] == 0.7


def test_a_value_that_is_not_finite_is_said_so(tmp_path: Path) -> None:
    Run(tmp_path).begin().log(1, loss=float("nan"), projected_grad=float("inf"), eps=None)
    assert [read_csv(tmp_path)[0][name] for name in ("loss", "projected_grad", "eps")] == ["NaN", "inf", ""]
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "projected_grad": None}
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_a_skipped_step_has_a_row_without_a_loss(tmp_path: Path) -> None:
    Run(tmp_path).begin().log(1, num_skipped_steps=1, num_queries=2)
    assert (read_csv(tmp_path)[0]["num_skipped_steps"], read_csv(tmp_path)[0]["loss"]) == ("1", "")


def test_resuming_drops_later_rows_and_a_half_written_line(tmp_path: Path) -> None:
    run = Run(tmp_path).begin()
    for step in range(1, 6):
        run.log(step, loss=1.0 / step)
    whole = (tmp_path / "metrics.csv").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    for name in ("metrics.csv", "metrics.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"step": 6, "lo')
    resumed = Run(tmp_path).begin(step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    for step in range(4, 6):
        resumed.log(step, loss=1.0 / step)
    assert ((tmp_path / "metrics.csv").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == whole


def test_a_resumed_run_adds_to_the_row_it_stopped_at(tmp_path: Path) -> None:
    Run(tmp_path).begin().log(1, loss=1.0).log(2, loss=0.5)
    Run(tmp_path).begin(step=2).log(2, eval_accuracy=0.9).log(3, loss=0.25)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert [row["eval_accuracy"] for row in read_csv(tmp_path)] == ["", "0.9", ""]


def test_a_fresh_run_starts_new_files(tmp_path: Path) -> None:
    Run(tmp_path).begin().log(7, loss=1.0)
    Run(tmp_path).begin().log(1, loss=2.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert len(read_csv(tmp_path)) == 1


def test_an_evaluation_before_training_waits_and_destroys_nothing(tmp_path: Path) -> None:
    Run(tmp_path).log(0, eval_accuracy=0.5, num_queries=0).begin().log(1, loss=1.0).log(2, loss=0.5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    looked = Run(tmp_path).log(0, eval_accuracy=0.1)  # evaluated only: the folder's run is another's
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    looked.begin(step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_best_models_metric_gets_a_column(tmp_path: Path) -> None:
    Run(tmp_path, best="f1").begin().log(1, eval_f1=0.7, eval_recall=0.6)
    (row,) = read_csv(tmp_path)
    assert tuple(row) == (*COLUMNS, "eval_f1")
    assert row["eval_f1"] == "0.7"
    assert read_metrics(tmp_path)[0]["eval_recall"] == 0.6


@pytest.mark.parametrize("best", [None, "loss", "eval_loss", "accuracy"])
def test_the_columns_are_fixed_otherwise(tmp_path: Path, best: str | None) -> None:
    assert Run(tmp_path, best=best).begin().callback.columns == COLUMNS


def test_only_process_zero_writes_and_the_summary_row_is_no_row(tmp_path: Path) -> None:
    Run(tmp_path / "a", zero=False).begin().log(1, loss=1.0)
    assert not (tmp_path / "a").exists()
    Run(tmp_path / "b").begin().log(1, train_runtime=1.0, train_loss=0.5)
    assert read_metrics(tmp_path / "b") == []


def test_tensors_and_numpy_numbers_are_plain_numbers(tmp_path: Path) -> None:
    import numpy as np
    import torch

    Run(tmp_path).begin().log(
        1, loss=torch.tensor(0.5), eval_accuracy=np.float64(0.75), per_class=np.array([1.0, np.nan])
    )
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": 0.5, "eval_accuracy": 0.75, "per_class": [1.0, None],
    }  # fmt: skip
