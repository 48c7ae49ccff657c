"""A bench's folder: one JSON file a finished cell, and claims by which processes on many machines share the work."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from zoft.bench.claims import Claim, claimed, holder
from zoft.bench.plan import Cell, Entry, Plan
from zoft.errors import UserError
from zoft.utils.files import write_atomically

ROWS, WORK, FAILED, PLAN = "cells", "work", "failed", "plan.json"
Row = dict[str, Any]


class Ledger:
    """The rows of a bench.

    Args:
        folder: of the bench; shared by all machines.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def keep_plan(self, plan: Plan) -> None:
        """Write down what is run here, so that the folder alone says it later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(plan) | {"unfit": sorted(plan.unfit)}
        write_atomically(self.folder / PLAN, json.dumps(values, indent=1) + "\n")

    def plan(self) -> Plan:
        """The plan that was last run here.

        Raises:
            UserError: none was, or by a version whose plans have other keys.
        """
        file = self.folder / PLAN
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values["methods"] = {name: Entry(**settings) for name, settings in values["methods"].items()}
            values["unfit"] = {(task, prompt, mode) for task, prompt, mode in values["unfit"]}
            return Plan(**values | {"output_dir": str(self.folder)})  # it may have been moved
        except FileNotFoundError:
            raise UserError(
                f"output_dir={self.folder} holds no {PLAN}: give the bench's own arguments too, config=NAME ..."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no plan of this version ({error}): give the bench's own arguments") from error

    def row(self, cell: Cell, identity: list[str]) -> Row | None:
        """A cell's row, or None where it is not finished.

        Args:
            cell: which.
            identity: what the row must be of.

        Raises:
            UserError: the row is of something else: the folder holds another bench.
        """
        try:
            row = dict(json.loads(self._file(cell).read_text(encoding="utf-8")))
            recorded = list(row["identity"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._file(cell)} is not a row of this version ({error}): remove it, and its cell is run again"
            ) from error
        if recorded != identity:
            dropped, added = set(recorded) - set(identity), set(identity) - set(recorded)
            raise UserError(
                f"output_dir={self.folder} holds another bench: {cell.name} was run with "
                f"{' '.join(sorted(dropped)) or 'less'} and is now {' '.join(sorted(added)) or 'without it'}; "
                "choose another output_dir"
            )
        return row

    def write(self, cell: Cell, row: Row) -> None:
        """Keep a finished cell."""
        file = self._file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(row, indent=1) + "\n")

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return self._file(cell).is_file()

    def number_of_rows(self) -> int:
        """How many cells are finished, other plans' in this folder too."""
        return sum(1 for _ in (self.folder / ROWS).rglob("*.json"))

    def fail(self, cell: Cell, why: str) -> None:
        """Say why a cell could not be carried out; it is not tried again until the bench is started anew."""
        file = self.folder / FAILED / f"{cell.name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, why.rstrip() + "\n")

    def failures(self, cells: Iterable[Cell]) -> dict[Cell, str]:
        """Those of the cells that could not be carried out, and why."""
        if not (self.folder / FAILED).is_dir():
            return {}
        files = {cell: self.folder / FAILED / f"{cell.name}.txt" for cell in cells}
        return {cell: file.read_text(encoding="utf-8") for cell, file in files.items() if file.is_file()}

    def forget_failures(self, cells: Iterable[Cell]) -> None:
        """Let failed cells be tried again."""
        for cell in self.failures(cells):
            (self.folder / FAILED / f"{cell.name}.txt").unlink(missing_ok=True)

    def clear(self, cell: Cell) -> None:
        """Remove what an unfinished cell has kept."""
        shutil.rmtree(self.work(cell), ignore_errors=True)

    def work(self, cell: Cell) -> Path:
        """Where an unfinished cell keeps its journal and checkpoints."""
        return self.folder / WORK / cell.name.replace("/", "--")

    def claimed(self, cell: Cell) -> AbstractContextManager[Claim | None]:
        """Hold a cell while the block runs; None where another process holds it."""
        return claimed(self._claim(cell))

    def holder(self, cell: Cell) -> str:
        """The process that works at a cell; empty where none does."""
        return holder(self._claim(cell))

    def _claim(self, cell: Cell) -> Path:
        work = self.work(cell)
        return work.with_name(f"{work.name}.claim")

    def _file(self, cell: Cell) -> Path:
        return self.folder / ROWS / f"{cell.name}.json"
