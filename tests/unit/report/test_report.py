"""report.md, report.json and the curve: what is known and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoft.report.plots import learning_curve, running_mean
from zoft.report.report import summary_lines, write_report

FACTS: dict[str, Any] = {
    "run_name": "quickstart", "model": "tiny", "zero_shot": 0.624, "final": 0.92, "num_eval_rows": 1000,
    "num_queries": 2000, "budget_queries": 2001, "num_steps": 1000, "num_skipped_steps": 3, "seconds": 312.0,
    "seconds_forward": 290.0, "seconds_other": 22.0, "peak_memory_mb": 614.4, "inference_peak_mb": 512.0,
    "backprop_estimate_mb": 2048.0, "num_trainable": 1_000, "num_params": 4_000, "weights_sha256": "abc",
    "versions": {"zoft": "0.1.0", "torch": "2.13.0"}, "command": "zoft train config=quickstart",
}  # fmt: skip


def test_everything_known_is_in_the_report(tmp_path: Path) -> None:
    text = write_report(tmp_path, FACTS).read_text()
    for row in (
        "| zero-shot | 62.4 % [59.4, 65.3] |",
        "| final | 92.0 % [90.2, 93.5] |",
        "| difference | +29.6 points |",
        "| evaluated on | 1,000 rows |",
        "| queries | 2,000 of 2,001 |",
        "| steps | 1,000 |",
        "| steps skipped | 3: their loss was not finite |",
        "| wall time | 05:12 (04:50 in forward passes, 00:22 in everything else) |",
        "| peak memory | 0.60 GiB |",
        "| inference alone | 0.50 GiB; the run took 1.20 times that |",
        "| backpropagation | about 2.00 GiB with AdamW on the same weights, by estimate; "
        "the run took 0.30 times that |",
        "| weights trained | 1,000 of 4,000 (25 %) |",
        "| weights' SHA-256 | `abc` |",
        "| versions | zoft 0.1.0, torch 2.13.0 |",
        "zoft train config=quickstart",
    ):
        assert row in text
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["difference_points"] == 29.6
    assert saved["final_interval"] == pytest.approx([0.9015, 0.9353], abs=1e-4)


def test_a_missing_fact_is_left_out_of_everything(tmp_path: Path) -> None:
    for name in FACTS:
        less = {**FACTS, name: None if name != "seconds" else float("nan")}
        text = write_report(tmp_path, less).read_text()
        assert name not in json.loads((tmp_path / "report.json").read_text())
        for wrong in ("None", "nan", "null", "0.0 %", "00:00", "0.00 GiB"):
            assert wrong not in text
            assert wrong not in "\n".join(summary_lines(less))


def test_nothing_known_is_an_empty_report(tmp_path: Path) -> None:
    assert write_report(tmp_path, {}).read_text() == "# A zoft run\n"
    assert summary_lines({}) == []


def test_a_measured_zero_is_said(tmp_path: Path) -> None:
    assert "| zero-shot | 0.0 % [0.0, 0.4] |" in write_report(tmp_path, {**FACTS, "zero_shot": 0.0}).read_text()


def test_another_metric_is_no_percentage(tmp_path: Path) -> None:
    text = write_report(tmp_path, {"metric": "f1", "final": 0.8125, "zero_shot": 0.5, "num_eval_rows": 10}).read_text()
    assert "| final | 0.812 |" in text
    assert "%" not in text
    assert "points" not in text


def test_facts_it_does_not_know_go_into_the_json(tmp_path: Path) -> None:
    write_report(tmp_path, {"history": [1.0, float("nan")], "where": tmp_path})
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["history"] == [1.0, None]
    assert saved["where"] == str(tmp_path)


def test_the_console_summary() -> None:
    assert summary_lines(FACTS) == [
        "accuracy  92.0 % [90.2, 93.5] from zero-shot 62.4 % [59.4, 65.3], +29.6 points on 1,000 rows",
        "spent     2,000 of 2,001 queries, 1,000 steps, 05:12 (04:50 in forward passes, 00:22 in everything else)",
        "memory    0.60 GiB, inference alone 0.50 GiB, "
        "backpropagation about 2.00 GiB with AdamW on the same weights, by estimate",
        "trained   1,000 of 4,000 (25 %)",
    ]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": i, "queries": 2 * i, "loss": 1 / i, "eval_accuracy": min(1.0, i / 30)} for i in range(1, 41)],
        [{"step": 1, "queries": 2, "loss": 1.0}, {"step": 2, "queries": 4, "loss": None}],
        [{"step": 0, "queries": 0, "eval_accuracy": 1.0}],
        [{"step": 1, "queries": 2, "eval_loss": 0.5}],
    ],
    ids=["both", "loss only, one not finite", "one evaluation", "evaluation loss only"],
)
def test_the_curve_is_a_png(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    write_rows(tmp_path, rows)
    before = dict(matplotlib.rcParams)
    path = learning_curve(tmp_path, zero_shot=0.25, num_eval_rows=200)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.name == "curve.png"
    assert dict(matplotlib.rcParams) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_nothing_to_draw_is_no_curve(tmp_path: Path) -> None:
    assert learning_curve(tmp_path) is None
    write_rows(tmp_path, [{"step": 1, "num_skipped_steps": 1, "queries": 2}])
    assert learning_curve(tmp_path) is None


def test_the_running_mean_does_not_bend_a_straight_line() -> None:
    line = [float(i) for i in range(20)]
    assert running_mean(line, 7) == pytest.approx(line)
