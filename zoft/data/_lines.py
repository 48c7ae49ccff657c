"""Text lines of a file, decoded and bounded: a line without an end is an error, not all the memory there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from zoft.errors import UserError

MAX_BYTES = 4 * 2**20
"""Of one row; about a million tokens, where models read some ten thousand."""

TOO_LONG = f"more than {MAX_BYTES // 2**20} MiB in one row, which no model reads at once: cut it into several"


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end); a byte order mark is left out.

    Raises:
        UserError: a line that is not UTF-8, or longer than :data:`MAX_BYTES`.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_BYTES + 1):
            number += 1
            if len(raw) > MAX_BYTES:
                raise UserError(f"{path}:{number}: {TOO_LONG}")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(not_utf8(path, number, error.start, raw)) from None


def not_utf8(path: Path, line: int, byte: int, beginning: bytes) -> str:
    """What is said of bytes that are no text."""
    what = "UTF-16 text" if line == 1 and beginning[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
    return f"{path}:{line}: {what} (byte {byte} of the line); re-encode it as UTF-8"
