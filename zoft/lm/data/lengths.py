"""How long rows are in tokens, and how many were cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

UNCUT = 1 << 20
"""Tokens that no row has: what is encoded with it is whole."""


class Truncation(NamedTuple):
    """What a limit has cut.

    Args:
        num_cut: rows that lost tokens.
        num_rows: of all.
        longest: tokens of the longest one when it was whole.
    """

    num_cut: int
    num_rows: int
    longest: int


def length_of(row: Any) -> int:
    """Tokens of an encoded row of any form; of the longest of its options or answers.

    Example:
        >>> length_of({"sequences": [[1, 2], [1, 2, 3]]}), length_of({"input_ids": [1]})
        (3, 1)
    """
    if "chosen" in row:
        return max(len(row[side]["input_ids"]) for side in ("chosen", "rejected"))
    return max(map(len, row["sequences"])) if "sequences" in row else len(row["input_ids"])


def cut_of(rows: Sequence[Any], limit: int, whole: Callable[[], Sequence[Any]]) -> Truncation | None:
    """How many rows were cut at a limit; None where none is as long as that.

    Args:
        rows: encoded with the limit.
        limit: tokens kept of a row, without what is kept free for an answer.
        whole: encodes the same rows without a limit; called only where some may have been cut.
    """
    if max(map(length_of, rows)) < limit:
        return None
    lengths = [length_of(row) for row in whole()]
    return Truncation(sum(length > limit for length in lengths), len(lengths), max(lengths))
