"""Rows from a local file (json, jsonl, csv, tsv, parquet), an asset or a hub dataset, one at a time, with its place."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.data import _json, _parquet
from zoft.lm.data._json import lines_of
from zoft.lm.hub import not_here, not_waited_for, out_of_reach
from zoft.utils.files import at_home

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_ROWS = 20_000_000
"""Rows read of one source; a few kilobytes of parquet can hold a thousand times as many."""

ASSET = "zoft:"
"""What a source begins with that is a data set of :mod:`zoft.lm.data.assets`."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]*){0,2}")
_NOT_HUB_NAMES = ("json", "csv", "text", "parquet", "arrow", "pandas", "sql", "xml", "spark", "generator", "cache")


def read_rows(source: str, split: str = "train") -> list[Row]:
    """All rows of a file or of one split of a hub dataset.

    Args:
        source: a path that ends in one of :data:`SUFFIXES`; ``zoft:NAME``, which is fetched on first use; or a hub
            name: ``nyu-mll/glue:sst2`` with a subset, ``name:subset:split`` or ``name::split`` with a split of its own.
        split: the hub dataset's split where the name has none; a file has only one.

    Returns:
        One dict a row.

    Raises:
        UserError: the file is not there, is empty, or has a broken line (``file:line: what is wrong``).
    """
    return [row for _, row in read_placed(source, split)]


def read_placed(source: str, split: str = "train") -> Iterator[tuple[str, Row]]:
    """The rows one at a time, each with the place that an error names; no more than one row of a file is held.

    Yields:
        (``file:line`` or ``file: row N``, the row).

    Raises:
        UserError: as for :func:`read_rows`.
    """
    number = 0
    for number, (where, row) in enumerate(_open(source, split), start=1):
        if number > MAX_ROWS:
            raise UserError(f"{source} has more than {MAX_ROWS:,} rows: give a file with fewer")
        yield where, row
    if not number:
        raise UserError(f"{source} has no rows: give a file that has some")


def column(row: Row, name: str, source: str, number: int) -> Any:
    """``row[name]``, or an error that names the file, the row and the columns there are."""
    if name not in row or row[name] is None:
        raise UserError(f"{source}: row {number} has no {name!r} (its columns: {', '.join(map(str, row))})")
    return row[name]


def text_in(row: Mapping[str, Any], name: str, where: str) -> str:
    """A row's text, which must be there and hold more than blanks.

    Raises:
        UserError: it is not, with the place and the columns that there are.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        blank = "is empty" if not value or isinstance(value, str) else "is no text"
        why = blank if name in row else f"is not there (its columns: {', '.join(map(str, row))})"
        raise UserError(f"{where}: {name!r} {why}")
    if not is_unicode(value):
        raise UserError(f"{where}: {name!r} holds half a character")
    return value


def is_unicode(text: str) -> bool:
    r"""Whether a text is whole characters; bytes that are no UTF-8, and halves of pairs, are read as surrogates.

    Example:
        >>> is_unicode("é"), is_unicode("\udcff")
        (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def located(source: str) -> Path:
    """Where a source would lie on this machine: the file of an asset, which is fetched on first use, or the path it is.

    Raises:
        UserError: no data set has the asset's name, or it cannot be fetched.

    Example:
        >>> located("zoft:sms-spam").name, located("mail.csv").name
        ('sms_spam.csv', 'mail.csv')
    """
    if not source.startswith(ASSET):
        return at_home(source)
    from zoft.lm.data.assets import ASSETS, fetch

    name = source.removeprefix(ASSET)
    known = [asset.name for asset in ASSETS.values() if asset.target.endswith(SUFFIXES)]
    if name not in known:
        raise UserError(f"no data set to fetch is called {name[:80]!r}.{did_you_mean(name[:80], known)}")
    return fetch(name)


def _open(source: str, split: str) -> Iterator[tuple[str, Row]]:
    try:
        path = located(source)
        kind, is_file, is_there = path.suffix.lower(), path.is_file(), path.exists()
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, ~nobody, a null byte
        raise UserError(f"{source!r:.200} is not a data file ({getattr(error, 'strerror', None) or error})") from None
    if kind in SUFFIXES:
        if is_there and path.is_dir():
            raise UserError(f"{source} is a folder: give a file in it")
        if not is_file:
            raise UserError(f"there is no data file {source} (looked in {Path.cwd()})")
        return _of_file(path, kind)
    if is_there or not _HUB_NAME.fullmatch(source) or ".." in source or source.partition(":")[0] in _NOT_HUB_NAMES:
        raise UserError(
            f"{source} is not a data file: expected a name ending in {', '.join(SUFFIXES)}, or a hub dataset, e.g. "
            "nyu-mll/glue:sst2"
        )
    return _from_hub(source, split)


def _of_file(path: Path, kind: str) -> Iterator[tuple[str, Row]]:
    try:
        yield from _READERS[kind](path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _separated(path: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    reader = csv.reader((line for _, line in lines_of(path)), delimiter=delimiter, strict=True)
    began = 0
    try:
        for began, row in _cells(path, reader):
            yield f"{path}:{began}", row
    except csv.Error as error:
        reason = str(error)
        if "field limit" in reason:
            reason = f"a cell of more than {csv.field_size_limit():,} characters; is a quotation mark missing?"
        elif "expected after" in reason or "unexpected end" in reason:
            reason = f"a quotation mark that does not fit ({error}); inside a quoted cell it is written twice"
        elif "new-line character" in reason:
            reason = "a line end of old Macs (a carriage return alone): write it with line feeds"
        raise UserError(f"{path}:{max(began + 1, reader.line_num)}: {reason}") from None


def _cells(path: Path, reader: Any) -> Iterator[tuple[int, Row]]:
    header = [name.strip() for name in next(reader, [])]
    if not header:
        return
    if len(set(header)) < len(header):
        twice = next(name for place, name in enumerate(header) if name in header[:place])
        raise UserError(f"{path}:1: two columns are called {twice[:80]!r}: rename one")
    for cells in reader:
        if cells and len(cells) != len(header):
            raise UserError(f"{path}:{reader.line_num}: {len(cells):,} cells, the header has {len(header):,}")
        if cells:
            yield reader.line_num, dict(zip(header, cells, strict=True))


_READERS = {
    ".jsonl": _json.rows_of_lines,
    ".json": _json.rows_of_list,
    ".csv": lambda path: _separated(path, ","),
    ".tsv": lambda path: _separated(path, "\t"),
    ".parquet": _parquet.rows_of,
}


def _from_hub(source: str, split: str) -> Iterator[tuple[str, Row]]:
    """A dataset's rows from where `datasets` keeps them on disk; it runs no code of the repository."""
    import datasets

    name, _, rest = source.partition(":")
    subset, _, chosen = rest.partition(":")
    try:
        with not_waited_for():
            loaded = datasets.load_dataset(name, subset or None, split=chosen or split)
        for number, row in enumerate(loaded, start=1):
            yield f"{source}: row {number}", dict(row)
    except Exception as error:  # the hub client raises a dozen kinds; the user needs one sentence
        if out_of_reach():
            raise not_here(f"the dataset {source}", f"a local file ({', '.join(SUFFIXES)})") from None
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"could not load {source!r} ({chosen or split}): {first_line}; give a local file instead "
            f"({', '.join(SUFFIXES)})"
        ) from None
