"""`zoft bench`: a grid of methods, tasks, prompts and seeds at one budget; a table and pictures."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from typing import Any

from zoft.cli import requeue_on_signals
from zoft.errors import UserError
from zoft.utils.terminal import fitted

FLAGS = ("--plan", "--time", "--draw")


def command(arguments: list[str]) -> int:
    """Bench.

    Returns:
        The exit code: 1 where cells could not be carried out.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in zoft train
    from zoft.bench.reading import fill_in, read_plan
    from zoft.cli.train import _quiet

    _quiet()
    logging.getLogger("zoft").setLevel(logging.ERROR)  # what a method is warned of would be said for every cell
    flags = {word for word in arguments if word in FLAGS}
    if "--time" in flags and "--plan" not in flags:
        raise UserError("--time goes with --plan: a bench that runs says with every cell how long is left")
    if {"--plan", "--draw"} <= flags:
        raise UserError("--plan says what would be run, and --draw draws what was: give one of them")
    words = [word for word in arguments if word not in flags]
    plan = read_plan(words)
    if "--draw" not in flags or any(word.startswith("config=") for word in words):  # else as it was when it was run
        fill_in(plan)
    if "--plan" in flags:
        print(fitted("\n".join([plan_text(plan), *_of_a_cell(plan, probe="--time" in flags)])))
        return 0
    requeue_on_signals()
    from zoft.bench.ledger import Ledger
    from zoft.bench.worker import known, left, run_bench

    ledger = Ledger(plan.output_dir)
    rows = known(plan, ledger) if "--draw" in flags else run_bench(plan)
    failures = ledger.failures(left(plan, rows))
    if "--draw" in flags and not rows:
        raise UserError(f"output_dir={plan.output_dir} holds no finished cell of this bench: run it without --draw")
    if any(row["test"] is not None for row in rows.values()):
        from zoft.bench.pictures import draw
        from zoft.bench.table import write

        print(write(plan, rows))
        drawn = ", ".join(path.name for path in draw(plan, rows))
        print(f"\nbench   {plan.output_dir}: bench.md, bench.csv, {drawn}")
    for cell, why in failures.items():
        print(f"zoft: error: {cell.name}: {why.strip().splitlines()[-1]}", file=sys.stderr)
    missing = len(left(plan, rows)) - len(failures)
    if missing and "--draw" not in flags:
        print(
            f"zoft: error: {missing} cells are not there: a process died, of too little memory perhaps. The same "
            "command goes on; jobs=1 takes the least memory",
            file=sys.stderr,
        )
    return 1 if failures or (missing and "--draw" not in flags) else 0


def plan_text(plan: Any) -> str:
    """A bench before it runs: what is varied, how many cells that makes, and a cell's command."""
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    lines = [
        f"tasks       {', '.join(plan.tasks)}",
        f"prompts     {', '.join(plan.prompts)}",
        f"methods     {', '.join(f'{m} ({plan.methods[m].learning_rate:g})' for m in plan.runs)}",
        f"references  {', '.join(plan.references)}",
        f"rates       x {rates}, chosen by the dev rows of seed {plan.seeds[0]}; up to {plan.grow} more beyond an edge",
        f"seeds       {', '.join(map(str, plan.seeds))}",
        f"cells       {plan.num_cells:,} of {plan.queries:,} queries",
    ]
    if plan.unfit:
        lines.append(f"left out    {', '.join(sorted('/'.join(one) for one in plan.unfit))}: they do not go together")
    cells = list(plan.cells())
    run = next(cell for cell in cells if cell.seed is not None)
    lines.append(f"a cell      zoft train {shlex.join(plan.arguments(run))}")
    return "\n".join(lines)


def _of_a_cell(plan: Any, *, probe: bool) -> list[str]:
    """What the first cell that trains takes, and with ``probe`` three steps of it how long all of them.

    Nothing where its rows or its model are not at hand, unless a probe is asked for.
    """
    from zoft.config import compose
    from zoft.run.build import load_rows
    from zoft.use.plan.estimate import of_run, seconds_of

    try:
        cfg = compose(plan.arguments(next(cell for cell in plan.cells() if cell.seed is not None)))
        rows = load_rows(cfg)[1]
        lines = [line.replace("memory  ", "memory      ", 1) for line in of_run(cfg, rows)]
        return [*lines, _time_of(plan, seconds_of(cfg, rows))] if probe else lines
    except (UserError, OSError):
        if probe:
            raise
        return []


def _time_of(plan: Any, seconds: float) -> str:
    """The line that says how long the training of all cells takes, from what that of one does."""
    from zoft.report.text import duration

    runs = plan.num_cells - sum(cell.seed is None for cell in plan.cells())
    return (
        f"time        about {duration(runs * seconds / plan.jobs)} to train {runs:,} cells with jobs={plan.jobs}, by "
        f"three steps of the first ({duration(seconds)} each); evaluations and loading come on top"
    )
