"""Values of a row's columns, checked: an error names the source, the row and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.files import Row, column
from zoft.lm.tasks._labels import label_key


def text(row: Row, name: str, source: str, number: int) -> str:
    """The text in column ``name``, as it stands there."""
    value = column(row, name, source, number)
    if not isinstance(value, str):
        raise UserError(f"{source}: row {number}: {name} must be text, got {_shown(value)}")
    return value


def one_of(row: Row, name: str, known: Sequence[str], source: str, number: int, *, named: bool = False) -> int:
    """The index of the label in column ``name``: a number in the order of ``known``, or a name where ``named``."""
    value = column(row, name, source, number)
    names = {label_key(label): place for place, label in enumerate(known)}
    places = {str(place): place for place in range(len(known))}
    try:
        key = label_key(value)
    except UserError as error:
        raise UserError(f"{source}: row {number}: {error}") from None
    if key is None:
        raise UserError(f"{source}: row {number}: no label: {name!r} is empty: fill it in, or leave the row out")
    # SuperGLUE's own files have true and false
    index = names.get(key) if key in ("true", "false") else places.get(key, names.get(key) if named else None)
    if index is not None:
        return index
    meaning = ", ".join(f"{place} ({label})" for place, label in enumerate(known))
    near = f".{did_you_mean(value, known)}" if named and isinstance(value, str) and value else ""
    raise UserError(f"{source}: row {number}: {name} must be one of {meaning}, got {_shown(value)}{near}")


def texts(row: Row, path: str, source: str, number: int) -> list[str]:
    """The list of texts at ``path``, a column or ``column.key`` of a nested one; never empty."""
    name, _, key = path.partition(".")
    value = column(row, name, source, number)
    if key:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
        raise UserError(f"{source}: row {number}: {path} must be a list of one text or more, got {_shown(value)}")
    return list(value)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
