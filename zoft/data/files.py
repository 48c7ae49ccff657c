"""Rows from a local file (json, jsonl, csv, tsv, parquet) or a hub dataset; errors name the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoft.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of a file or of one split of a hub dataset.

    Args:
        source: a path that ends in one of :data:`SUFFIXES`, or a hub name such as ``nyu-mll/glue:sst2``.
        split: the hub dataset's split; a file has only one.

    Returns:
        One dict a row.

    Raises:
        UserError: the file is not there, is empty, or has a broken line (``file:line: what is wrong``).
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise UserError(f"there is no data file {source} (looked in {Path.cwd()})")
        rows = list(_READERS[path.suffix.lower()](path))
    elif path.exists():
        raise UserError(f"{source} is not a data file: expected a name ending in {', '.join(SUFFIXES)}")
    else:
        rows = _from_hub(source, split)
    if not rows:
        raise UserError(f"{source} has no rows")
    return rows


def column(row: Row, name: str, source: str, number: int) -> Any:
    """``row[name]``, or an error that names the file, the row and the columns there are."""
    if name not in row or row[name] is None:
        raise UserError(f"{source}: row {number} has no {name!r} (its columns: {', '.join(map(str, row))})")
    return row[name]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 text (byte {error.start} of the line); re-encode it"
                ) from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        yield row


def _json(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error})") from None
    except RecursionError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of JSON objects; one object a line is .jsonl")
    yield from rows


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter)
    try:
        yield from _cells(path, reader)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None


def _cells(path: Path, reader: Any) -> Iterator[Row]:
    header = next(reader, None)
    if not header:
        return
    for cells in reader:
        if cells and len(cells) != len(header):
            raise UserError(f"{path}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}")
        if cells:
            yield dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a parquet file ({error})") from None


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet,
}


def _from_hub(source: str, split: str) -> list[Row]:
    import datasets

    name, _, subset = source.partition(":")
    try:
        return list(datasets.load_dataset(name, subset or None, split=split))
    except Exception as error:  # the hub client raises a dozen kinds; the user needs one sentence
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"could not load {source!r} ({split}): {first_line}; give a local file instead ({', '.join(SUFFIXES)})"
        ) from None
