"""What fits on the terminal: how wide it is, and text laid out for that width."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import TextIO

_NARROWEST = 40  # columns: below that more is broken than read
_FULL = 90  # a line of a text that reaches this far with the next one's first word was broken because it was full
_ITEM = re.compile(r"(\s*(?:usage:|- \S+|\S.*?(?=\s{2})))(\s+)(\S.*)")  # a label, a gap of two blanks or more, a text
_COMMAND = re.compile(r"\s+(?:zoft|torchrun|pip|python|make) ")
_ROW = re.compile(r"\s*\S.*?\s{2,}\S.*?\s{2,}\S")  # of a table: three columns or more
_EXAMPLE = re.compile(r" {2,6}(?:zoft|torchrun|pip|python|make) ")  # to be copied; a synopsis is further in
_RUNNABLE = re.compile(r"(?!.* \[)(?:zoft|torchrun|pip|python|make) .*\S=\S")  # a whole entry; no synopsis
_ENDS_IN_COMMAND = re.compile(r"(?<=.{20}: )zoft \S.*$")  # but not in 'error: zoft bench needs ...'
_KEPT = "\x00"  # a blank at which no line is broken


def width_of(stream: TextIO | None = None) -> int | None:
    """How many characters fit on a line of what is behind `stream`; None where nothing says so, as for a file.

    Args:
        stream: standard output when None. The variable COLUMNS comes before what a terminal says of itself.
    """
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or None  # some pseudo-terminals say 0
    except (OSError, ValueError, AttributeError):
        return None


def columns(stream: TextIO) -> int:
    """As :func:`width_of`, and 80 where nothing says so."""
    return width_of(stream) or 80


def whole(text: str) -> str:
    """Text for :func:`laid_out` in which no line is broken."""
    return text.replace(" ", _KEPT)


def fitted(text: str, stream: TextIO | None = None) -> str:
    """Text for people, laid out for the terminal behind `stream`; as it is for a file or a pipe."""
    width = width_of(stream)
    return text.replace(_KEPT, " ") if width is None else laid_out(text, width)


def laid_out(text: str, width: int) -> str:
    """Text whose lines are no longer than `width`, broken between words.

    A line of two columns (a label, two blanks or more, a text) keeps its second column, or has it below where too
    little room is left. Lines that follow on a full one in the same column are filled anew with it. Words,
    commands and rows of a table are never broken.

    Args:
        text: lines; what is not wider than `width` stays as it is.
        width: characters on a line.

    Example:
        >>> print(laid_out("budget  240 queries, which are 236 steps of one or of five", 40))
        budget  240 queries, which are 236 steps
                of one or of five
    """
    width = max(width, _NARROWEST)
    lines = (line for lines in _items(text.split("\n")) for line in _refilled(lines, width))
    return "\n".join(lines).replace(_KEPT, " ")


def _items(lines: list[str]) -> list[list[str]]:
    """Lines that make one sentence or entry, together."""
    items: list[list[str]] = []
    for line in lines:
        before = items[-1][-1] if items else ""
        indent = len(line) - len(line.lstrip())
        full = before.strip() and line.strip() and len(before) + 1 + len(line.split()[0]) > _FULL
        alone = _ITEM.match(line) or _COMMAND.match(line) or _COMMAND.match(before)
        if full and not alone and indent == _column(items[-1][0]):
            items[-1].append(line)
        else:
            items.append([line])
    return items


def _column(line: str) -> int:
    """Where the text of an entry begins."""
    parts = _ITEM.match(line)
    return parts.start(3) if parts else len(line) - len(line.lstrip())


def _refilled(lines: list[str], width: int) -> list[str]:
    if all(len(line) <= width for line in lines) or _ROW.match(lines[0]):
        return lines
    first, column = lines[0], _column(lines[0])
    indent = len(first) - len(first.lstrip())
    text = " ".join([first[column:], *(line.strip() for line in lines[1:])])
    if len(lines) == 1 and _RUNNABLE.match(text):
        return lines
    if column == indent:
        return [first] if _EXAMPLE.match(first) else _wrapped(text, " " * indent, " " * indent, width)
    label = first[:column]
    if column <= width // 2:
        return _wrapped(text, label, " " * column, width)
    below = " " * (indent + 4)  # too little room beside the label
    return [label.rstrip(), *_wrapped(text, below, below, width)]


def _wrapped(text: str, first: str, others: str, width: int) -> list[str]:
    whole = _ENDS_IN_COMMAND.search(text)
    if whole and len(whole[0]) <= width - len(others):
        text = text[: whole.start()] + whole[0].replace(" ", _KEPT)
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
