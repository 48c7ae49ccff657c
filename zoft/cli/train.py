"""`zoft train`: compose, then run; with -m a sweep."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.cli import requeue_on_signals
from zoft.errors import UserError
from zoft.utils.terminal import fitted

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.config.sweep import CellResult
    from zoft.run.shared import Shared

COLUMNS = ("zero_shot", "final", "num_queries", "seconds", "peak_memory_mb")
"""What a sweep's table shows of what its runs return; all their numbers when they have none of these."""

_EXAMPLES = """ To start:
  zoft train config=quickstart                       the demo: a real model on real text, two minutes
  zoft train config=classify task.train=reviews.csv  your own rows; also config=instruct, chat, preference, reward
  zoft data show config=classify task.train=reviews.csv   what the model would see of them; zoft train --help"""
START = "there is nothing to train on: name an experiment, config=NAME, or a task, task=NAME." + _EXAMPLES

_STARTS = ("config=", "task=")

_FLAGS = {"-m": "multirun", "--multirun": "multirun", "--cfg": "cfg"}


def command(arguments: list[str]) -> int:
    """Train."""
    # Before torch is loaded: threads that spin while they wait take the cores from other processes of the machine; on a
    # busy one a query of the quickstart took 0.25 s without spinning and 0.99 s with it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    requeue_on_signals()
    flags = {_flag(argument) for argument in arguments if argument.startswith("-")}
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    _quiet()
    if "cfg" not in flags and all(word.lstrip("+").startswith("task.train=") for word in overrides):
        raise UserError(START)  # before the task by default is found to have no file
    if flags == {"multirun", "cfg"}:
        raise UserError("--cfg prints one run: drop -m, or give each key one value")
    if "multirun" in flags:
        return _sweep(overrides)
    from zoft.config import compose, resolved_yaml

    cfg = compose(overrides)
    if "cfg" in flags:
        print(resolved_yaml(cfg), end="")
        return 0
    _require_a_start(overrides, cfg)
    from zoft.run.train import run
    from zoft.use.plan.estimate import of_run

    try:
        run(cfg, opening=of_run)
    finally:
        _leave_the_others()
    return 0


def _require_a_start(overrides: list[str], cfg: ZoftConfig | None = None) -> None:
    """Refuse arguments without experiment or data (the defaults alone would be a run of days), and a config without."""
    if not any(word.lstrip("+").startswith(_STARTS) for word in overrides):
        raise UserError(START)
    if cfg is not None and not getattr(cfg.task, "train", True):
        from zoft.lm.tasks.base import NO_ROWS

        raise UserError(f"{NO_ROWS}.{_EXAMPLES}")


def _leave_the_others() -> None:
    """Under torchrun: a process that exits while gloo's threads are alive dies of SIGABRT now and then."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _flag(text: str) -> str:
    if text not in _FLAGS:
        raise UserError(f"zoft train has no flag {text!r}.{_near_flag(text)} See zoft train --help")
    return _FLAGS[text]


def _near_flag(text: str) -> str:
    """What was probably meant: a flag, or a key that others write as one."""
    from zoft.config.catalog import ELSEWHERE, ORDER

    key, _, value = text.lstrip("-").partition("=")
    key = key.replace("-", "_")
    if key in ELSEWHERE:
        return f" Did you mean {ELSEWHERE[key]}={value or '...'}?"
    if key in (*ORDER, "seed", "output_dir", "protocol"):
        return f" Did you mean {key}={value or '...'}?"
    near = difflib.get_close_matches(text, [*_FLAGS, "--help"], n=1)
    if near:
        return f" Did you mean {near[0]}?"
    return f" Did you mean {text.lstrip('-')}?" if "=" in text else ""


def _quiet() -> None:
    """Hydra's warnings are not the user's business; zoft's notes are one line each, from one process."""
    warnings.filterwarnings("ignore", module=r"hydra(\.|$)|hydra_plugins(\.|$)")
    log = logging.getLogger("zoft")
    if not any(isinstance(handler, Notes) for handler in log.handlers):
        log.addHandler(Notes())
    log.setLevel(logging.WARNING if os.environ.get("RANK", "0") == "0" else logging.ERROR)


class Notes(logging.Handler):
    """What zoft's modules warn of, on standard error as it is then."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        print(fitted(f"zoft: note: {record.getMessage()}", sys.stderr), file=sys.stderr)


def run_cell(cfg: ZoftConfig) -> dict[str, Any]:
    """One cell of a sweep; a name that other processes can import."""
    from zoft.run.train import run
    from zoft.use.plan.estimate import of_run

    return dict(run(cfg, opening=of_run, shared=_shared()) or {})


@lru_cache
def _shared() -> Shared:
    """What the cells of this process share: one load of the model, one reading of the rows."""
    from zoft.run.shared import Shared

    return Shared()


def _sweep(overrides: list[str]) -> int:
    from zoft.config import multirun

    _require_a_start(overrides)
    results = multirun(overrides, run_cell)
    print(table(results))
    _compared(results)
    for result in results:
        if result.error:
            print(f"zoft: error: {result.name}: {result.error}", file=sys.stderr)
    failed = [result for result in results if result.error]
    if not failed:
        return 0
    return 2 if all(result.user_error for result in failed) else 1


def _compared(results: list[CellResult]) -> None:
    """The sweep's cells as `zoft compare` has them, in the sweep's folder; nothing where no cell became a run."""
    from zoft.use.compare.picture import picture
    from zoft.use.compare.runs import grouped, read_runs
    from zoft.use.compare.table import table as compared
    from zoft.use.compare.table import write

    runs = [result.output_dir for result in results if os.path.isfile(os.path.join(result.output_dir, "report.json"))]
    if len(runs) < 2:
        return
    folder, groups = Path(runs[0]).parent, grouped(read_runs(runs))
    write(compared(groups), folder)
    picture(groups, folder)
    print(f"{folder}: compare.md, compare.csv, compare.html, compare.png")


def table(results: list[CellResult]) -> str:
    """One line a cell: its name and the numbers its run returned."""
    numbers = [key for result in results for key, value in result.metrics.items() if _is_number(value)]
    columns = [key for key in COLUMNS if key in numbers] or list(dict.fromkeys(numbers))
    rows = [["cell", *columns]]
    for result in results:
        values = [f"{result.metrics[key]:.6g}" if _is_number(result.metrics.get(key)) else "" for key in columns]
        rows.append([result.name, *(["failed", *values[1:]] if result.error and values else values)])
        if result.error and not columns:
            rows[-1].append("failed")
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(max(map(len, rows)))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(lines)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
