"""A bench of a tiny model: every cell once, the same numbers however it is cut up, a table that adds up, pictures."""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from statistics import mean

import pytest

from tests import runs
from zoft.bench import worker
from zoft.bench.cells import run_cell
from zoft.bench.choosing import best_point, rate_searches
from zoft.bench.ledger import Ledger
from zoft.bench.plan import MODES, Cell
from zoft.bench.reading import fill_in, read_plan
from zoft.bench.results import Results
from zoft.cli import main
from zoft.run.shared import Shared

METHODS = "{mezo: 1e-2, broken: {learning_rate: 1e300, arguments: [method=mezo]}, adamw: 1e-2}"


def words(folder, output_dir, *more):
    """The command line of a bench of 2 prompts x (2 evaluations + 3 methods x (2 rates + 1 seed)) cells."""
    base = [
        word
        for word in runs.arguments(folder, "unused")
        if not word.startswith(
            ("output_dir", "budget", "optimizer", "method", "task=", "trainer.eval", "trainer.save", "trainer.logging")
        )
    ]
    file = folder / "bench.yaml"
    file.write_text(
        "base: [trainable=all, trainer.logging_nan_inf_filter=false]\n"
        "tasks: {words: [task=custom]}\n"
        f"methods: {METHODS}\n"
        "references: [zero_shot, icl, adamw]\n"
        "queries: 24\nseeds: [0, 1]\nrates: [0.5, 1]\ngrow: 0\ndemonstrations: 2\nevaluations: 3\n"
    )
    return [f"config={file}", *base, f"output_dir={output_dir}", *more]


def plan_and_rows(line):
    """(plan, rows) of a bench that has been run."""
    plan = read_plan(line)
    fill_in(plan)
    return plan, worker.known(plan, Ledger(plan.output_dir))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(its folder, its command line, plan, rows)."""
    folder = tmp_path_factory.mktemp("bench")
    line = words(folder, folder / "out")
    assert main(["bench", *line]) == 0
    return folder, line, *plan_and_rows(line)


def test_every_cell_has_a_row_and_nothing_else_is_left(bench):
    folder, _, plan, rows = bench
    broken = [cell for cell in rows if cell.method == "broken"]
    assert len(rows) == 2 * (2 + 2 * 3 + 2)  # what diverges at every rate is not run with the other seed
    assert all(rows[cell]["failed"] and rows[cell]["test"] is None for cell in broken)
    assert len(broken) == 4
    assert {key for key, search in rate_searches(plan, rows).items() if search.chosen} == {
        ("words", p, m) for p in plan.prompts for m in plan.runs if m != "broken"
    }
    assert {file.name for file in (folder / "out").iterdir()} == {
        *("cells", "work", "plan.json", "bench.md", "bench.csv", "curves.png", "ranks.png", "rates.png", "gaps.png")
    }
    assert not list((folder / "out" / "work").iterdir())


def test_the_folder_alone_draws_and_goes_on(bench, tmp_path, capsys, monkeypatch):
    """Wherever it lies by then, and whatever has become of the file that the bench was read from."""
    folder, _, plan, rows = bench
    moved = tmp_path / "moved"
    shutil.copytree(folder / "out", moved)
    (moved / "bench.md").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "output_dir=moved", "--draw"]) == 0
    assert (moved / "bench.md").read_text() == (folder / "out" / "bench.md").read_text()
    assert "moved: bench.md" in capsys.readouterr().out
    saved_plan = read_plan([f"output_dir={folder / 'out'}"])
    assert saved_plan == plan
    assert worker.known(saved_plan, Ledger(saved_plan.output_dir)) == rows
    assert main(["bench", f"output_dir={folder / 'out'}"]) == 0  # nothing is left to do
    assert main(["bench", "output_dir=moved", "jobs=2", "--draw"]) == 2
    assert "zoft bench needs config=" in capsys.readouterr().err
    assert main(["bench", "output_dir=nothing", "--draw"]) == 2
    assert "holds no plan.json: give the bench's own arguments too" in capsys.readouterr().err
    (moved / "plan.json").write_text("{}")
    assert main(["bench", "output_dir=moved", "--draw"]) == 2
    assert "is no plan of this version" in capsys.readouterr().err


def test_what_is_left_is_said_from_the_first_run_on(bench):
    _, _, plan, _ = bench
    pace = worker.Pace(plan)
    pace.add(Cell("words", "none", "zero_shot"), 1.0)
    assert pace.left(1) == ""
    pace.add(Cell("words", "none", "mezo", 1.0, 0), 60.0)
    pace.add(Cell("words", "none", "mezo", 1.0, 1), 120.0)
    assert pace.left(plan.num_cells - 2) == "; about 03:00 left"
    assert pace.left(plan.num_cells) == ""


def test_a_row_is_what_zoft_train_does(bench, tmp_path):
    """The dev scores along a cell are those of `zoft train` with the cell's arguments."""
    _, _, plan, rows = bench
    cell = Cell("words", "none", "mezo", 1.0, 0)
    row = rows[cell]
    out = tmp_path / "run"
    more = ["trainer.eval_steps=4", "trainer.eval_on_start=true", "trainer.eval_strategy=steps", f"output_dir={out}"]
    assert main(["train", *plan.arguments(cell), *more]) == 0
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {line["queries"]: line["eval_loss"] for line in logged if "eval_loss" in line}
    assert {point["queries"]: point["loss"] for point in row["curve"]} == curve
    assert row["steps"] == 12
    assert row["queries"] == 24
    assert len(row["curve"]) == 4
    best = best_point(row, "loss")
    assert best["queries"] > 0
    assert best["loss"] == min(p["loss"] for p in row["curve"][1:])
    if best["queries"] == 24:  # then the best checkpoint is the final model
        assert row["test"]["accuracy"] == json.loads((out / "final.json").read_text())["accuracy"]


def test_a_method_that_needs_no_probes_is_evaluated_as_often_as_others(tmp_path, bench):
    """It takes more steps than its settings let one expect, and its checkpoint is chosen from as many points."""
    folder, *_ = bench
    more = ["methods={zoft: 1}", "references=[]", "prompts=[none]", "rates=[1]", "seeds=[0]", "budgets=[10]"]
    line = words(folder, tmp_path / "nodes", *more)
    assert main(["bench", *line]) == 0
    (row,) = plan_and_rows(line)[1].values()
    assert [point["queries"] for point in row["curve"]] == [0, 8, 10, 16, 24]
    assert row["steps"] == row["queries"] == 24


def test_the_test_rows_are_scored_by_the_best_checkpoint(bench, tmp_path):
    """A rate that first helps and then hurts: the test scores are those of the run cut off at its best point."""
    folder, _, _plan, _ = bench
    search = ["methods=[mezo]", "references=[]", "prompts=[none]", "rates=[3]", "seeds=[0]"]
    line = words(folder, tmp_path / "a", *search, "queries=48")
    assert main(["bench", *line]) == 0
    (row,) = plan_and_rows(line)[1].values()
    best = best_point(row, "loss")
    assert best["queries"] < 48, "this rate was meant to overshoot"
    again = words(folder, tmp_path / "b", *search, f"queries={best['queries']}", "evaluations=1")
    assert main(["bench", *again]) == 0
    (cut,) = plan_and_rows(again)[1].values()
    assert cut["test"]["loss"] == row["test"]["loss"]
    assert cut["curve"][-1]["loss"] == best["loss"]


def test_repeating_it_runs_nothing_and_a_lost_row_comes_back_the_same(bench, capsys, monkeypatch):
    folder, line, _, _ = bench
    file = folder / "out" / "cells" / "words" / "none" / "mezo-x0.5-seed0.json"
    before, table = json.loads(file.read_text()), (folder / "out" / "bench.md").read_text()
    monkeypatch.setattr("zoft.bench.cells.run_cell", None)  # nothing may be run
    assert main(["bench", *line]) == 0
    monkeypatch.undo()
    file.unlink()
    capsys.readouterr()
    assert main(["bench", *line]) == 0
    again = json.loads(file.read_text())
    assert capsys.readouterr().out.count("mezo-x0.5-seed0") == 1
    for row in (before, again):
        for name in ("seconds", "peak_memory_mb", "memory_before_mb"):
            row.pop(name)
        for name in [name for name in row["test"] if "second" in name or "runtime" in name]:
            row["test"].pop(name)
    assert again == before
    assert len(table.splitlines()) == len((folder / "out" / "bench.md").read_text().splitlines())


def test_two_processes_share_the_cells_and_find_the_same(bench, tmp_path):
    folder, _, _, rows = bench
    line = words(folder, tmp_path / "two", "jobs=2", "prompts=[aligned]", "methods=[mezo]", "references=[zero_shot]")
    assert main(["bench", *line]) == 0
    _, shared = plan_and_rows(line)
    assert {cell.method for cell in shared} == {"mezo", "zero_shot"}
    assert len(shared) == 4
    for cell, row in shared.items():
        assert row.get("curve") == rows[cell].get("curve")
        assert row["test"]["loss"] == rows[cell]["test"]["loss"]


def _work(line):
    os.setsid()
    plan = read_plan(line)
    fill_in(plan)
    worker.work(plan)


def test_a_smaller_budget_is_judged_as_a_run_of_its_own_would_be(bench, tmp_path):
    """Dev and test scores of a run of 24 queries after 12 are those of a run of 12, to the last bit."""
    folder, _, _, _ = bench
    few = ["methods=[mezo]", "references=[]", "prompts=[none]", "rates=[1]", "seeds=[0]", "evaluations=1"]
    assert main(["bench", *words(folder, tmp_path / "long", *few, "budgets=[12]")]) == 0
    assert main(["bench", *words(folder, tmp_path / "short", *few, "queries=12")]) == 0
    (long,), (short,) = (
        plan_and_rows(words(folder, tmp_path / name, *few, more))[1].values()
        for name, more in (("long", "budgets=[12]"), ("short", "queries=12"))
    )
    assert long["curve"][:-1] == short["curve"]
    assert len(long["curve"]) == 3
    for name in ("loss", "accuracy"):
        assert long["at_budgets"]["12"]["test"][name] == short["test"][name]
    assert "none | words, 12 | words, 24 |" in (tmp_path / "long" / "bench.md").read_text()
    assert (tmp_path / "long" / "budgets.png").read_bytes().startswith(b"\x89PNG")


def test_cells_share_one_model_and_find_the_same(bench, tmp_path):
    """A cell behind one that has left infinite weights in the shared model is the cell alone; no hook stays behind."""
    _, _, plan, rows = bench
    shared = Shared()
    cells = [Cell("words", "none", *one) for one in (("mezo", 1.0, 0), ("broken", 1.0, 0), ("mezo", 1.0, 0))]
    hooks, found_rows = [], []
    for number, cell in enumerate(cells):
        found_rows.append(run_cell(plan, cell, tmp_path / str(number), shared))
        ((model, _),) = shared.models.values()
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
    assert len(set(hooks)) == 1
    for row in found_rows[::2]:
        assert row["curve"] == rows[cells[0]]["curve"]
        assert row["test"]["loss"] == rows[cells[0]]["test"]["loss"]
    assert found_rows[1]["failed"]


def test_a_killed_process_leaves_a_cell_that_goes_on(bench, tmp_path):
    folder, _, _, rows = bench
    line = words(folder, tmp_path / "killed", "prompts=[aligned]", "methods=[mezo]", "references=[]")
    process = multiprocessing.get_context("fork").Process(target=_work, args=(line,))
    process.start()
    work = tmp_path / "killed" / "work"
    until = time.monotonic() + 60
    while not list(work.glob("*mezo*/journal.bin")) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(work.glob("*.claim")), "it was killed in the middle of a cell"
    assert main(["bench", *line]) == 0
    assert {cell: row["curve"] for cell, row in plan_and_rows(line)[1].items()} == {
        cell: row["curve"] for cell, row in rows.items() if cell.prompt == "aligned" and cell.method == "mezo"
    }
    assert not list(work.iterdir())


def test_the_table_adds_up(bench):
    folder, _, plan, rows = bench
    with (folder / "out" / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows)
    results = Results(plan, rows)
    group = ("words", "none")
    mezo = results.results[group, "mezo"]
    mezo_lines = [
        line
        for line in lines
        if line["method"] == "mezo" and line["prompt"] == "none" and float(line["factor"]) == mezo.factor
    ]
    assert len(mezo_lines) == 2
    assert mean(mezo.test()) == pytest.approx(mean(float(line["test_metric"]) for line in mezo_lines))
    adamw = results.results[group, "adamw"]
    assert results.gap(group, "mezo", "adamw") == [
        a["loss"] - b["loss"] for a, b in zip(mezo.dev(), adamw.dev(), strict=True)
    ]
    assert results.ranks("none") == {"mezo": 1.0, "broken": 2.0}  # references are not ranked
    assert results.robustness("broken") == {0.5: math.inf, 1.0: math.inf}
    text = (folder / "out" / "bench.md").read_text()
    assert f"{100 * mean(mezo.test()):.1f} ±" in text
    assert "| *zero_shot* |" in text
    assert text.count("diverges at every rate") == 2
    for mode in MODES[:2]:
        assert rows[Cell("words", "none", mode)]["test"]["accuracy"] >= 0


def test_a_failed_cell_stops_no_other_and_is_tried_again(bench, tmp_path, monkeypatch, capsys):
    folder, _, _, _ = bench
    line = words(folder, tmp_path / "out", "methods=[mezo, adamw]", "references=[adamw]", "prompts=[none]", "rates=[1]")
    from zoft.bench import cells

    real = cells.run_cell

    def breaks(plan, cell, work, shared):
        if cell.method == "mezo":
            raise RuntimeError("the disk is on fire")
        return real(plan, cell, work, shared)

    monkeypatch.setattr(cells, "run_cell", breaks)
    assert main(["bench", *line]) == 1
    assert "mezo-x1-seed0: RuntimeError: the disk is on fire" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "cells").rglob("adamw*.json"))) == 2
    monkeypatch.undo()
    assert main(["bench", *line]) == 0
    assert len(list((tmp_path / "out" / "cells").rglob("*.json"))) == 4
    assert not list((tmp_path / "out" / "failed").rglob("*.txt"))


def test_a_process_that_dies_is_noticed(bench, tmp_path, monkeypatch, capsys):
    folder, _, _, _ = bench
    monkeypatch.setattr(worker, "work", lambda plan: None)  # as if it had gone before its first cell
    assert main(["bench", *words(folder, tmp_path / "out", "prompts=[none]")]) == 1
    assert "8 cells are not there: a process died" in capsys.readouterr().err


def test_a_head_and_diagnostics(bench, tmp_path):
    """A fresh head is trained (and has no in-context learning); rows keep what their runs' diagnostics measured."""
    folder, _, _, _ = bench
    line = words(
        folder, tmp_path / "out", "methods=[mezo]", "references=[icl]", "prompts=[head]", "rates=[1]", "seeds=[0]"
    )
    line += ["diagnostics=full", "diagnostics.every=4", "trainable=last_blocks"]
    assert main(["bench", *line]) == 0
    (row,) = plan_and_rows(line)[1].values()
    assert "objective=classes" in row["identity"]
    assert {"cosine", "snr", "fd_error_at_eps"} <= row["diagnostics"].keys()
    assert 0 < row["diagnostics"]["cosine"] <= 1
    with (tmp_path / "out" / "bench.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["cosine"]) == row["diagnostics"]["cosine"]


def test_another_bench_in_the_folder_is_refused(bench, capsys):
    _, line, _, _ = bench
    for more in ("trainer.per_device_train_batch_size=2", "select=metric"):
        assert main(["bench", *line, more]) == 2
        assert "holds another bench" in capsys.readouterr().err


def test_what_the_files_say_is_part_of_a_cell(bench):
    """The same arguments and another data file: another bench."""
    folder, line, plan, _ = bench
    data = folder / "data.jsonl"
    data_stat = data.stat()
    os.utime(data, ns=(data_stat.st_atime_ns, data_stat.st_mtime_ns + 1))
    try:
        again = read_plan(line)
        fill_in(again)
    finally:
        os.utime(data, ns=(data_stat.st_atime_ns, data_stat.st_mtime_ns))
    cell = Cell("words", "none", "mezo", 1.0, 0)
    assert again.arguments(cell) == plan.arguments(cell)
    assert again.identity(cell) != plan.identity(cell)
    fewer = read_plan([*line, "prompts=[none]", "methods=[mezo]", "seeds=[0]"])
    fill_in(fewer)
    assert fewer.identity(cell) == plan.identity(cell)  # a part of a bench is of the same cells


def test_a_row_that_cannot_be_read_is_named(bench, tmp_path, capsys):
    folder, _, _, _ = bench
    file = tmp_path / "out" / "cells" / "words" / "none" / "mezo-x1-seed0.json"
    file.parent.mkdir(parents=True)
    for text in ("{", "{}", "[1]"):
        file.write_text(text)
        assert main(["bench", *words(folder, tmp_path / "out")]) == 2
        assert f"{file} is not a row of this version" in capsys.readouterr().err


def test_the_plan_is_shown_without_running(bench, tmp_path, capsys):
    folder, _, _, _ = bench
    line = words(folder, tmp_path / "out")
    assert main(["bench", *line, "--plan"]) == 0
    out = capsys.readouterr().out
    assert "cells       22 of 24 queries" in out
    assert "zoft train" in out
    assert not (tmp_path / "out").exists()
    assert main(["bench", *line, "--draw"]) == 2
    shutil.rmtree(tmp_path, ignore_errors=True)
