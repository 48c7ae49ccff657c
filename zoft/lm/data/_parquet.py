"""Rows from parquet, decoded a few at a time: a few hundred bytes of it can stand for gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.lm.data._json import MAX_BYTES, TOO_LONG

BATCH = 64
"""Rows decoded at once."""

MAX_RATIO = 200
"""What is packed tighter is no text; text packs to a third or a twentieth."""

_SMALL = 64 * 2**20  # bytes that a column may unpack to, whatever its ratio
_MANY = 2**24  # numbers that a column may hold in less than a bit each


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file: row N``, row) of a parquet file.

    Texts are kept as indices into their dictionary until a row's size is known: a repeated long text costs a bit a
    row in the file.

    Raises:
        UserError: not a parquet file, columns of one name, or a file that unpacks to what nobody wrote as text.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    limits: dict[str, Any] = {"thrift_string_size_limit": 2**26, "thrift_container_size_limit": 2**20}
    plainly: dict[str, Any] = {"pre_buffer": False, "buffer_size": 2**20, "arrow_extensions_enabled": False}
    try:
        with pyarrow.parquet.ParquetFile(path, **limits, **plainly) as file:
            _check(path, file.metadata)
            texts = [c.path for c in map(file.schema.column, range(len(file.schema))) if "BYTE" in c.physical_type]
            metadata = file.metadata
        with pyarrow.parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts, **limits, **plainly) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
                for row in _rows(batch, path, number):
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: not a parquet file that can be read ({reason:.200})") from None


def _check(path: Path, metadata: Any) -> None:
    """Refuse what the footer says is a bomb."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(metadata.num_columns)):
            unpacked, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if (unpacked > _SMALL and unpacked > MAX_RATIO * packed) or (
                chunk.num_values > _MANY and chunk.num_values > 8 * unpacked
            ):
                raise UserError(
                    f"{path}: the column {chunk.path_in_schema[:80]!r} unpacks {packed:,} bytes to {unpacked:,} and "
                    f"{chunk.num_values:,} values, which is no text: write the file anew from what you trust"
                )


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"{path}: two columns are called {twice[:80]!r}: rename one")


def _rows(batch: Any, path: Path, number: int) -> list[dict[str, Any]] | Iterator[dict[str, Any]]:
    """The rows of a batch; one by one where all of them together are large."""
    if _size(batch.columns) <= MAX_BYTES:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    return _one_by_one(batch, path, number)


def _one_by_one(batch: Any, path: Path, number: int) -> Iterator[dict[str, Any]]:
    for place in range(batch.num_rows):
        row = batch.slice(place, 1)
        if _size(row.columns) > MAX_BYTES:
            raise UserError(f"{path}: row {number + place + 1}: {TOO_LONG}")
        yield row.to_pylist()[0]


def _size(arrays: list[Any]) -> int:
    """Bytes that these columns take as Python values, at least: texts at their length each time they stand there."""
    import pyarrow
    import pyarrow.compute as compute

    size = 0
    for array in arrays:
        kind = array.type
        if pyarrow.types.is_dictionary(kind):
            lengths = compute.binary_length(array.dictionary).take(array.indices)
            size += (compute.sum(lengths).as_py() or 0) + 8 * len(array)
        elif pyarrow.types.is_struct(kind):
            size += _size(array.flatten())
        elif pyarrow.types.is_map(kind):
            size += _size([array.keys, array.items])
        elif pyarrow.types.is_nested(kind):
            size += 8 * len(array) + _size([array.flatten()])
        elif hasattr(array, "total_values_length"):  # strings that are not kept as a dictionary
            size += array.total_values_length
        else:
            size += 8 * len(array)
    return size
