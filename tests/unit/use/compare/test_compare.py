"""Runs beside each other: seeds together, their interval, files and pictures; a run's curve drawn again."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from zoft.cli import main
from zoft.lm.metrics.intervals import mean_of_seeds
from zoft.use.compare.picture import curves, picture
from zoft.use.compare.runs import grouped, read_runs
from zoft.use.compare.table import plain, table

CONFIG = """\
# @package _global_
defaults:
- _self_
- override /estimator: {estimator}
config: quick
seed: {seed}
output_dir: {folder}
estimator:
  eps: {eps}
optimizer:
  learning_rate: 0.01
"""


def a_run(
    folder: Path, seed: int, final: float, *, estimator: str = "central", eps: float = 1e-3, ended: bool = True
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(estimator=estimator, seed=seed, folder=folder, eps=eps))
    rows = [
        {
            "step": k,
            "queries": 2 * k,
            "seconds": k / 2,
            "tokens": 9 * k,
            "loss": 2.0 - k / 100,
            "eval_accuracy": 0.5 + k / 100 * final,
        }
        for k in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "metric": "accuracy",
        "zero_shot": 0.5,
        "final": final,
        "num_eval_rows": 100,
        "num_queries": 80,
        "seconds": 20.0,
    }
    if ended:
        (folder / "report.json").write_text(json.dumps(facts | {"peak_memory_mb": 1024.0, "num_tokens": 360}))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for estimator, finals in (("central", (0.7, 0.8, 0.75)), ("one_sided", (0.6, 0.62, 0.61))):
        for seed, final in enumerate(finals):
            a_run(tmp_path / "sweep" / f"estimator={estimator},seed={seed}", seed, final, estimator=estimator)
    return tmp_path / "sweep"


def test_runs_that_differ_in_their_seed_are_one_row_with_its_interval(sweep: Path, capsys: Any):
    assert main(["compare", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert "estimator=central" in said
    rows = list(csv.DictReader(io.StringIO((sweep / "compare.csv").read_text())))
    assert [(row["run"], row["seeds"]) for row in rows] == [("estimator=central", "3"), ("estimator=one_sided", "3")]
    low, high = mean_of_seeds([0.7, 0.8, 0.75])
    assert float(rows[0]["final"]) == pytest.approx(0.75)
    assert (float(rows[0]["low"]), float(rows[0]["high"])) == pytest.approx((low, high))
    assert float(rows[0]["gain"]) == pytest.approx(0.25)
    assert "75.0 % [62.6, 87.4]" in (sweep / "compare.md").read_text()
    assert "<td>estimator=central</td>" in (sweep / "compare.html").read_text()
    assert (sweep / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_one_run_has_its_own_interval_and_an_unfinished_one_none(tmp_path: Path):
    one, two = a_run(tmp_path / "one", 0, 0.7), a_run(tmp_path / "two", 0, 0.7, eps=1e-2, ended=False)
    rows = table(grouped(read_runs([str(one), str(two)])))
    assert rows[0]["run"] == "estimator.eps=0.001"
    assert rows[0]["low"] == pytest.approx(0.604, abs=1e-3)
    assert rows[1]["metric"] == "not finished"
    assert "not finished" in plain(rows)


def test_a_narrow_terminal_loses_columns_and_no_row_is_broken(sweep: Path):
    rows = table(grouped(read_runs([str(sweep)])))
    whole = plain(rows)
    assert plain(rows, 200) == whole
    narrow = plain(rows, 80)
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, whole.splitlines()))
    assert "peak" not in narrow
    assert narrow.splitlines()[0].split()[:1] == ["run"]
    assert "75.0 % [62.6, 87.4]" in plain(rows, 10), "what was reached is never left out"


def test_a_run_without_a_score_is_named_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its line is in the loss's panel alone."""
    from matplotlib.figure import Figure

    scored, other = a_run(tmp_path / "scored", 0, 0.7), a_run(tmp_path / "other", 0, 0.7, eps=1e-2)
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    without = [{key: value for key, value in row.items() if not key.startswith("eval_")} for row in rows[:1]]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    groups = grouped(read_runs([str(scored), str(other)]))
    picture(groups, tmp_path)
    (legend,) = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == {group.name for group in groups}
    (single,) = (line for line in drawn[0].axes[1].get_lines() if len(line.get_xdata()) == 1)
    assert single.get_marker() == "o"


@pytest.mark.parametrize("axis", ["queries", "seconds", "tokens"])
def test_a_curve_is_the_mean_over_the_seeds(axis: str, sweep: Path):
    (central, _) = grouped(read_runs([str(sweep)]))
    points = curves(central, "eval_accuracy", axis)
    assert len(points) == 40
    cost, mean, low, high = points[-1]
    assert cost == {"queries": 80, "seconds": 20, "tokens": 360}[axis]
    assert mean == pytest.approx(0.5 + 0.4 * 0.75)
    assert low < mean < high
    alone = curves(type(central)("one", central.runs[:1]), "loss", axis)
    assert all(math.isnan(point[2]) for point in alone)


def test_a_run_is_plotted_again(sweep: Path, capsys: Any):
    run = next(sweep.iterdir())
    assert main(["plot", str(run)]) == 0
    assert (run / "curve.png").stat().st_size > 3_000
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "say which runs"),
        (["compare", "nowhere"], "there is no folder nowhere"),
        (["compare", "empty"], "empty holds no run of zoft train"),
        (
            ["compare", "SWEEP", "axis=query"],
            "axis must be one of queries, seconds, tokens, got 'query'. Did you mean queries?",
        ),
        (["compare", "SWEEP", "--jsn"], "Did you mean --json?"),
        (["plot"], "say which run"),
        (["plot", "SWEEP"], "holds 6 runs: zoft compare"),
    ],
)
def test_wrong_requests_are_one_sentence(words: list[str], message: str, sweep: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.chdir(sweep.parent)
    (sweep.parent / "empty").mkdir()
    assert main([word.replace("SWEEP", str(sweep)) for word in words]) == 2
    assert message in capsys.readouterr().err


def test_seeds_that_end_alike_have_the_interval_of_the_rows(tmp_path: Path):
    """Two equal numbers have no spread, which is not to say that nothing is left to chance."""
    folders = [str(a_run(tmp_path / f"seed={seed}", seed, 0.7)) for seed in (0, 1)]
    (row,) = table(grouped(read_runs(folders)))
    assert row["seeds"] == 2
    assert (row["low"], row["high"]) == pytest.approx((0.604, 0.781), abs=1e-3)


def test_an_interval_of_accuracies_ends_at_all_right(tmp_path: Path):
    folders = [str(a_run(tmp_path / f"seed={seed}", seed, final)) for seed, final in enumerate((0.99, 1.0, 0.98))]
    (group,) = grouped(read_runs(folders))
    (row,) = table([group])
    low, _ = mean_of_seeds([0.99, 1.0, 0.98])
    assert (row["low"], row["high"]) == (low, 1.0)
    assert plain([row]).splitlines()[1].count("99.0 % [96.5, 100.0]") == 1
    for run, final in zip(group.runs, (1.0, 0.2, 0.3), strict=True):
        run.rows = [row | {"eval_accuracy": final, "loss": 10 * final} for row in run.rows]
    assert curves(group, "eval_accuracy", "queries")[0][2:] == (0.0, 1.0)
    assert curves(group, "loss", "queries")[0][3] > 10, "a loss has no such end"


def test_a_seed_twice_counts_once(tmp_path: Path, capsys: Any):
    ended = {"one": (0, 0.7, False), "again": (0, 0.7, True), "other": (1, 0.8, True), "third": (1, 0.8, False)}
    folders = [str(a_run(tmp_path / name, seed, final, ended=has)) for name, (seed, final, has) in ended.items()]
    assert main(["compare", *folders, f"output={tmp_path}", "--json"]) == 0
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert (row["seeds"], row["final"]) == (2, pytest.approx(0.75))
    assert "third are the same run, seed and all, which counts once" in " ".join(said.err.split())


def test_runs_with_many_differences_are_called_by_their_folder(tmp_path: Path):
    """A method is no name for runs of it that differ in four keys."""
    folders = [a_run(tmp_path / name, 0, 0.7) for name in ("plain", "wide")]
    config = folders[1] / "config.yaml"
    config.write_text(config.read_text() + "trainer:\n  a: 1\n  b: 2\n  c: 3\n  d: 4\n")
    for folder, method in zip(folders, ("mezo", "zoft"), strict=True):
        report = folder / "report.json"
        report.write_text(json.dumps(json.loads(report.read_text()) | {"method": method}))
    assert [group.name for group in grouped(read_runs([*map(str, folders)]))] == ["plain", "wide"]
    assert [group.name for group in grouped(read_runs([str(folders[0])]))] == ["mezo"], "nothing tells it from others"


@pytest.mark.filterwarnings("error")
def test_a_picture_of_many_runs_has_room_for_their_names(tmp_path: Path):
    (group,) = grouped(read_runs([str(a_run(tmp_path / "run", 0, 0.7))]))
    assert picture([type(group)(f"run {number}", group.runs) for number in range(60)], tmp_path)
