"""The journal of a search: one JSON line an evaluation, on the disk before the next one; a killed search reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.tuning.evaluation import Outcome
from zoft.utils import shared
from zoft.utils.rows import append_to_disk, drop_cut_line

NAME = "journal.jsonl"
_KIND = "zoft tune 1"


class TuneJournal:
    """Append-only file of what was evaluated; the first line says what is searched.

    The last line may be cut off by a crash: it is dropped, and its evaluation made again. Evaluations that failed at
    the very end, after which nothing else succeeded, are tried again as well: what made them fail may be mended.

    Args:
        path: the file; its folder is made. None keeps nothing.
        header: what must be the same for a search to go on: space, metric, seed, ...

    Raises:
        UserError: the file is that of another search, in use by another process, or none.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path, self.file = path, None
        self.header: dict[str, Any] = {"journal": _KIND, **header}
        self.known: dict[tuple[int, int], Outcome] = {}  # (number of the point, repeat)
        self.points: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = shared.no_link(str(path), os.O_RDWR | os.O_CREAT)
            self.file = shared.open_own(path, "a+b")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): choose another folder") from None
        try:
            if not shared.lock(self._lock):
                raise UserError(f"{path} is in use by another search: wait until it ends, or choose another folder")
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self.file is not None
        lines = [self._parsed(number, line) for number, line in enumerate(drop_cut_line(self.file), 1)]
        if not lines:
            self._append(self.header)
            return
        self._compare(lines[0])
        rows = lines[1:]
        while rows and rows[-1]["status"] == "failed":
            rows.pop()
        for row in rows:
            self.points[row["number"]] = row["point"]
            self.known[row["number"], row["repeat"]] = Outcome.of(row)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or ("journal" if number == 1 else "status") not in row:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{self.path} is not the journal of a search (line {number}): choose another folder"
            ) from None
        return row

    def _compare(self, there: dict[str, Any]) -> None:
        # batch: how many points were asked for side by side; a search goes on with what it began with
        self.header["batch"] = there.get("batch", self.header.get("batch"))
        for name in sorted({*there, *self.header}):
            before, now = there.get(name), self.header.get(name)
            if before != now:
                raise UserError(
                    f"{self.path} is the journal of another search: its {name} is {_as_text(before)}, and now it is "
                    f"{_as_text(now)}; choose another folder, or repeat that search's command to go on with it"
                )

    def note(self, number: int, repeat: int, point: dict[str, Any], outcome: Outcome) -> None:
        """Keep one evaluation: on the disk when this returns."""
        self._append({"number": number, "repeat": repeat, "point": point, **outcome.as_dict()})

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        assert self.path is not None
        append_to_disk(self.file, self.path, json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Let go of the file and its lock."""
        if self.file is not None:
            self.file.close()
            self.file = None
            shared.close(self._lock)


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={text}" for name, text in value.items())
    return " ".join(value) if isinstance(value, list) and value else str(value)
