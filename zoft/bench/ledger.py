"""A bench's folder: one JSON file a finished cell, and claims by which processes on many machines share the work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoft import atomic
from zoft.bench.plan import Cell
from zoft.errors import UserError

ROWS, WORK, FAILED = "cells", "work", "failed"
BEAT, STALE = 15.0, 180.0
"""Seconds between signs of life of who works at a cell, and without one after which the cell is anybody's."""

Row = dict[str, Any]


class Ledger:
    """The rows of a bench.

    A claim is a file that only one process can make; who holds it touches it every few seconds. Of a process that was
    killed the claim grows old and is taken over; its cell goes on from its journal. Ages are told by the file system's
    clock, so machines need not agree on the time. Should two processes ever hold one cell, they write the same row.

    Args:
        folder: of the bench; shared by all machines.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

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
        except FileNotFoundError:
            return None
        if row["identity"] != identity:
            there, now = set(row["identity"]) - set(identity), set(identity) - set(row["identity"])
            raise UserError(
                f"output_dir={self.folder} holds another bench: {cell.name} was run with "
                f"{' '.join(sorted(there)) or 'less'} and is now {' '.join(sorted(now)) or 'without it'}; "
                "choose another output_dir"
            )
        return row

    def write(self, cell: Cell, row: Row) -> None:
        """Keep a finished cell."""
        file = self._file(cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, json.dumps(row, indent=1) + "\n")

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return self._file(cell).is_file()

    def number_of_rows(self) -> int:
        """How many cells are finished, other plans' in this folder too."""
        return sum(1 for _ in (self.folder / ROWS).rglob("*.json"))

    def fail(self, cell: Cell, why: str) -> None:
        """Say why a cell could not be carried out; nobody tries it again until the bench is started anew."""
        file = self.folder / FAILED / f"{cell.name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, why.rstrip() + "\n")

    def failures(self) -> dict[str, str]:
        """Name of a cell -> why it could not be carried out."""
        place = self.folder / FAILED
        files = place.rglob("*.txt") if place.is_dir() else ()
        return {str(file.relative_to(place)).removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files}

    def forget_failures(self) -> None:
        """Let failed cells be tried again."""
        shutil.rmtree(self.folder / FAILED, ignore_errors=True)

    def work(self, cell: Cell) -> Path:
        """Where an unfinished cell keeps its journal and checkpoints."""
        return self.folder / WORK / cell.name.replace("/", "--")

    @contextlib.contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Hold a cell while the block runs; False where somebody else does."""
        claim = self._claim(cell)
        claim.parent.mkdir(parents=True, exist_ok=True)
        token = f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"
        if not (_make(claim, token) or (self._is_stale(claim) and _take_over(claim, token))):
            yield False
            return
        done = threading.Event()
        beats = threading.Thread(target=_beat, args=(claim, done), daemon=True)
        beats.start()
        try:
            yield True
        finally:
            done.set()
            beats.join()
            claim.unlink(missing_ok=True)

    def holder(self, cell: Cell) -> str:
        """Who works at a cell; empty where nobody does."""
        try:
            return self._claim(cell).read_text(encoding="utf-8").rpartition(" ")[0]
        except OSError:
            return ""

    def _claim(self, cell: Cell) -> Path:
        work = self.work(cell)
        return work.with_name(f"{work.name}.claim")

    def _file(self, cell: Cell) -> Path:
        return self.folder / ROWS / f"{cell.name}.json"

    def _is_stale(self, claim: Path) -> bool:
        try:
            seen, text = claim.stat().st_mtime, claim.read_text(encoding="utf-8")
        except OSError:
            return False  # it has just been let go of: the next look finds out
        if f" on {socket.gethostname()} " in text and not _is_alive(text.split()[1]):
            return True
        return self._now() - seen > STALE

    def _now(self) -> float:
        """The file system's time."""
        probe = self.folder / WORK / f".now-{os.getpid()}-{threading.get_ident()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _make(claim: Path, token: str) -> bool:
    try:
        with claim.open("x", encoding="utf-8") as file:
            file.write(token)
    except FileExistsError:
        return False
    return True


def _take_over(claim: Path, token: str) -> bool:
    """Move the old claim away (which succeeds for one process only) and make a new one."""
    away = claim.with_name(f".{claim.name}.{uuid.uuid4().hex}")
    try:
        claim.rename(away)
    except OSError:
        return False
    away.unlink(missing_ok=True)
    return _make(claim, token)


def _beat(claim: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(claim)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True
