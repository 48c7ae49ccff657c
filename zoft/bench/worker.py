"""Processes at work on a bench: each takes the next free cell until none is left; a failed one stops no other."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from statistics import fmean

from zoft.bench.choosing import best_point, rate_searches
from zoft.bench.claims import Claim
from zoft.bench.ledger import Ledger, Row
from zoft.bench.plan import MODES, Cell, Plan
from zoft.errors import UserError
from zoft.report.text import duration
from zoft.run.shared import Shared

_PAUSE = 1.0  # seconds between looks at what others have finished


def run_bench(plan: Plan) -> dict[Cell, Row]:
    """Run every cell without a row, with ``plan.jobs`` processes; other machines may do the same.

    Returns:
        The rows of all cells, whoever ran them.

    Raises:
        UserError: the folder holds another bench.
    """
    ledger = Ledger(plan.output_dir)
    rows = known(plan, ledger)  # another bench's folder is found out before anything runs
    ledger.keep_plan(plan)
    ledger.forget_failures(left(plan, rows))
    if plan.jobs == 1:
        work(plan)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.jobs)))
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=_child, args=(plan,), daemon=True) for _ in range(plan.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return known(plan, ledger)


def _child(plan: Plan) -> None:
    """A worker of its own process: Ctrl-C is its parent's to speak of."""
    try:
        work(plan)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"zoft: error: {error}", file=sys.stderr, flush=True)


def known(plan: Plan, ledger: Ledger, rows: dict[Cell, Row] | None = None) -> dict[Cell, Row]:
    """The rows that the ledger has.

    Args:
        plan: the bench.
        ledger: of its folder.
        rows: those that were there before; they are not read again.
    """
    rows = {} if rows is None else rows
    before = -1
    while len(rows) > before:  # rows say which learning rates are tried next, and which the other seeds have
        before = len(rows)
        for cell in plan.cells(rate_searches(plan, rows)):
            if cell not in rows and (row := ledger.row(cell, plan.identity(cell))) is not None:
                rows[cell] = row
    return rows


def left(plan: Plan, rows: dict[Cell, Row]) -> list[Cell]:
    """The cells that can run now and have no row yet."""
    return [cell for cell in plan.cells(rate_searches(plan, rows)) if cell not in rows]


def work(plan: Plan) -> None:
    """One process: take cells until none is left; where the others are at the last ones, wait for them."""
    _quiet()
    from zoft.run.shared import Shared

    ledger, shared, pace, here = Ledger(plan.output_dir), Shared(), Pace(plan), ("", "")
    rows: dict[Cell, Row] = {}
    while True:
        rows = known(plan, ledger, rows)
        cells = left(plan, rows)
        failures = ledger.failures(cells)
        cells = [cell for cell in cells if cell not in failures]
        if not cells:
            return
        for cell in _in_order(cells, here, ledger):
            with ledger.claimed(cell) as claim:
                if claim is not None and not ledger.has(cell):
                    here = (cell.task, cell.prompt)
                    _one(plan, cell, ledger, shared, claim, pace)
                    break
        else:
            time.sleep(_PAUSE)


def _in_order(cells: list[Cell], here: tuple[str, str], ledger: Ledger) -> list[Cell]:
    """Cells of the task at hand first, then those of tasks that no process works at: rows are encoded only once."""
    busy = {(cell.task, cell.prompt) for cell in cells if ledger.holder(cell)}
    return sorted(cells, key=lambda c: ((c.task, c.prompt) != here, (c.task, c.prompt) in busy))


class Pace:
    """How long this process's cells took, and so how long the others will."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # of evaluations, of runs

    def add(self, cell: Cell, seconds: float) -> None:
        """Count a cell that took this many seconds."""
        self.seconds[cell.seed is not None].append(seconds)

    def left(self, done: int) -> str:
        """The time to the end in words, by the mean run and the processes of this machine; empty before the first run.

        Args:
            done: cells that are finished. What is left counts as runs: evaluations are few, and come first.
        """
        runs, cells = self.seconds[True], self.plan.num_cells - done
        if not runs or cells < 1:
            return ""
        return f"; about {duration(cells * fmean(runs) / self.plan.jobs)} left"


def _one(plan: Plan, cell: Cell, ledger: Ledger, shared: Shared, claim: Claim, pace: Pace) -> None:
    from zoft.bench.cells import run_cell

    began = time.perf_counter()
    try:
        row = run_cell(plan, cell, ledger.work(cell), shared)
        outcome = outcome_line(row, plan)
    except Exception as error:  # whatever it is, the other cells are still worth their time
        if claim.is_ours():
            ledger.fail(cell, str(error) if isinstance(error, UserError) else traceback.format_exc())
            print(f"{cell.name}: failed: {' '.join(str(error).split()) or type(error).__name__}", flush=True)
        return
    if not claim.is_ours():  # this process was suspended for minutes, and another one has begun the cell anew
        return
    ledger.write(cell, row)
    ledger.clear(cell)
    done = ledger.number_of_rows()
    place, seconds = f"{done}/{max(done, plan.num_cells)}", time.perf_counter() - began
    pace.add(cell, seconds)
    print(f"{place:>9}  {cell.name:<44} {outcome}  ({seconds:.0f} s{pace.left(done)})", flush=True)


def outcome_line(row: Row, plan: Plan) -> str:
    """A cell's outcome in a few words."""
    metric = row["metric"]
    scale, unit = (100.0, " %") if metric == "accuracy" else (1.0, "")
    if row["method"] in MODES:
        return f"test {metric} {scale * row['test'][metric]:.1f}{unit}"
    if row["failed"]:
        return f"diverged: {row['failed']}"
    best = best_point(row, plan.select)
    if best is None:
        return "was not evaluated"
    return f"best dev loss {best['loss']:.3f}, dev {metric} {scale * best[metric]:.1f}{unit}"


def _quiet() -> None:
    """Cells tell their outcome, nothing else."""
    from zoft.lm.models.load import quiet

    quiet()
    logging.getLogger("zoft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers(\.|$)")
