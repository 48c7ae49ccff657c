"""Files of rows, one line each: a row is written once and whole, and a line that a kill has cut off is dropped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoft.utils import shared
from zoft.utils.files import write_atomically


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that were written to their end, without the newline; none where there is no file.

    Example:
        >>> whole_lines(Path("no/such/file"))
        []
    """
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def csv_line(cells: Iterable[Any]) -> bytes:
    r"""A row of a csv file.

    Example:
        >>> csv_line(["a", 1, None])
        b'a,1,\n'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def json_line(row: Mapping[str, Any]) -> bytes:
    r"""A row of a jsonl file; what JSON has no name for (NaN, inf) is an error, what it does not know becomes text.

    Example:
        >>> json_line({"step": 1})
        b'{"step": 1}\n'
    """
    return json.dumps(row, allow_nan=False, default=str).encode() + b"\n"


class RowFile:
    """A file that grows by whole lines.

    Args:
        path: the file, written anew (atomically); a symbolic link is refused when a row is added.
        lines: its first ones, each with its newline.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> file = RowFile(path, [csv_line(["step", "loss"])])
        >>> file.add(csv_line([1, 0.5])), file.replace_last(csv_line([1, 0.25])), whole_lines(path)
        (None, None, [b'step,loss', b'1,0.25'])
    """

    def __init__(self, path: Path, lines: Iterable[bytes] = ()) -> None:
        lines = list(lines)
        self.path = path
        write_atomically(path, b"".join(lines))
        self._last = sum(map(len, lines[:-1]))  # where the last line begins

    def add(self, line: bytes) -> None:
        """Write one more row; it is with the system when this returns."""
        with shared.open_own(self.path, "r+b") as file:
            self._last = file.seek(0, io.SEEK_END)
            file.write(line)

    def replace_last(self, line: bytes) -> None:
        """Write the last row anew; it may not be shorter, so nothing is cut off first and no kill leaves less."""
        with shared.open_own(self.path, "r+b") as file:
            file.seek(self._last)
            file.write(line)


def append(path: Path, lines: Iterable[bytes]) -> None:
    """Add rows to a file that an earlier process may have begun; a line that a kill has cut off is dropped first.

    Args:
        path: the file, made where it is not there; a symbolic link is refused.
        lines: the rows, each with its newline.
    """
    with shared.open_own(path, "a+b") as file:
        drop_cut_line(file)
        file.write(b"".join(lines))


def drop_cut_line(file: Any) -> list[bytes]:
    """Truncate a file, open for bytes, after its last whole line; returns its whole lines, without the newline."""
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        file.truncate(end)
    return list(content[:end].splitlines())
