"""Rows from JSON, an object a line or a list of objects; one object is parsed at a time, whatever the file holds."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


MAX_DEPTH = 32
"""Brackets inside brackets in one row; a chat with its tool calls has four."""

_CHUNK = 2**16
_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)
_BLANK = " \t\r\n"
_LIST_EXPECTED = "expected a list of JSON objects; one object a line is .jsonl"


def rows_of_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of a .jsonl file; blank lines are passed over."""
    for number, line in lines_of(path):
        if line.strip():
            yield f"{path}:{number}", parsed(line.rstrip(), path, number)


def rows_of_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of a .json file that is one list of objects."""
    for number, text in _objects(path):
        yield f"{path}:{number}", parsed(text, path, number)


def parsed(text: str, path: Path, line: int) -> dict[str, Any]:
    """One object from its text, which begins on line ``line``.

    Raises:
        UserError: not JSON, a key that stands twice, NaN or Infinity, a number too large, nested too deeply.
    """
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: not a JSON object ({error.msg} at {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}:{line}: not a JSON object that is a row (nested too deeply)") from None
    except ValueError as error:  # ours below, and Python's own for whole numbers of thousands of digits
        reason = str(error) if isinstance(error, _RefusedError) else "a number of too many digits"
        raise UserError(f"{path}:{line}: {reason}") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{line}: expected a JSON object, found {type(row).__name__}")
    if _depth(row) > MAX_DEPTH:
        raise UserError(f"{path}:{line}: not a JSON object that is a row (nested too deeply)")
    return row


class _RefusedError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise _RefusedError(f"the key {twice[:80]!r} stands twice in one object")
    return members


def _no_number(name: str) -> float:
    raise _RefusedError(f"{name} is not JSON, and no number to train on")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"the number {text[:40]} is too large")
    return value


def _depth(row: Any) -> int:
    """How many brackets are open at the deepest place; without recursion."""
    level, depth = [row], 0
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level = [part for part in inner if isinstance(part, dict | list)]
    return depth


def _objects(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every object of the one list in a file, without the list ever being held."""
    text = _Window(path)
    if text.next() != "[":
        raise UserError(text.not_a_list())
    text.drop(1)
    mark = text.next()
    while mark != "]":
        if mark != "{":
            raise UserError(text.not_a_list())
        end = text.end_of_object()
        yield text.line, text.held[:end]
        text.drop(end)
        mark = text.next()
        if mark == ",":
            text.drop(1)
            mark = "," if text.next() == "]" else text.next()
        elif mark != "]":
            raise UserError(text.not_a_list())
    text.drop(1)
    if text.next():
        raise UserError(text.not_a_list())


class _Window:
    """A file's text through a window that moves on: ``held`` begins on line ``line``."""

    def __init__(self, path: Path) -> None:
        self.path, self.held, self.line = path, "", 1
        self._chunks = _chunks(path)

    def next(self) -> str:
        """The next character that is not blank, now the first one held; empty at the file's end."""
        while True:
            rest = self.held.lstrip(_BLANK)
            self.drop(len(self.held) - len(rest))
            if self.held or not self._more():
                return self.held[:1]

    def drop(self, count: int) -> None:
        """Drop the first ``count`` characters."""
        self.line += self.held.count("\n", 0, count)
        self.held = self.held[count:]

    def end_of_object(self) -> int:
        """Where the object ends that the text begins with: brackets are counted outside of strings."""
        place, depth, in_string = 0, 0, False
        while True:
            for match in _MARKS.finditer(self.held, place):
                mark, place = match.group(), match.end()
                if mark == '"':
                    in_string = not in_string
                elif not in_string and mark[0] != "\\":
                    depth += 1 if mark in "{[" else -1
                    if not depth:
                        return place
                    if depth > MAX_DEPTH:
                        line = self.line + self.held.count("\n", 0, place)
                        raise UserError(f"{self.path}:{line}: nested too deeply to be a row")
            place = max(place, len(self.held) - 1)  # a backslash at the very end waits for what it escapes
            if len(self.held) > MAX_BYTES:
                raise UserError(f"{self.path}:{self.line}: {TOO_LONG}")
            if not self._more():
                raise UserError(f"{self.path}:{self.line}: not JSON: what begins here has no end")

    def not_a_list(self) -> str:
        """What is said where something other than a list's next object stands."""
        beginning = repr(self.held[:20]) if self.held else "the end of the file"
        return f"{self.path}:{self.line}: {_LIST_EXPECTED} (found {beginning})"

    def _more(self) -> bool:
        chunk = next(self._chunks, "")
        self.held += chunk
        return bool(chunk)


def _chunks(path: Path) -> Iterator[str]:
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    with path.open("rb") as file:
        while True:
            raw = file.read(_CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                good = error.object[: error.start]
                column = error.start - good.rfind(b"\n") - 1
                raise UserError(not_utf8(path, line + good.count(b"\n"), column, error.object)) from None
            if text:
                line += text.count("\n")
                yield text
            elif not raw:
                return
