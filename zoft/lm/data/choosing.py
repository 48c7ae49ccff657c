"""Which rows of a source become examples: the first n rows of a seeded permutation, whatever the source's size."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from zoft.errors import UserError
from zoft.lm.data.examples import num_chars

T = TypeVar("T")
KEPT_CHARS = 2**26
"""Characters of examples held while the rows are counted; of a larger source the chosen ones are read again."""


def choose(
    placed: Callable[[], Iterator[tuple[str, Any]]], example_of: Callable[[Any, str], T], wanted: int, seed: int
) -> list[T]:
    """The first ``wanted`` examples of the shuffled source; every row is checked, few are kept.

    Args:
        placed: opens the source: (place, row) one at a time.
        example_of: (row, place) -> example; raises for a row that does not fit.
        wanted: how many at most.
        seed: of the permutation.

    Example:
        >>> rows = lambda: ((f"row {i}", i) for i in range(5))
        >>> choose(rows, lambda row, where: str(row), 3, seed=0)
        ['2', '1', '0']
    """
    examples: list[T] | None = []
    count = size = 0
    for where, row in placed():
        example = example_of(row, where)
        count += 1
        if examples is not None:
            examples.append(example)
            size += num_chars(example)
            examples = None if size > KEPT_CHARS else examples
    order = array("q", range(count))
    random.Random(seed).shuffle(order)  # as a list of the examples would be shuffled
    chosen = list(order[:wanted])
    if examples is not None:
        return [examples[index] for index in chosen]
    return _again(placed(), example_of, chosen)


def _again(placed: Iterable[tuple[str, Any]], example_of: Callable[[Any, str], T], chosen: list[int]) -> list[T]:
    wanted = set(chosen)
    examples = {index: example_of(row, where) for index, (where, row) in enumerate(placed) if index in wanted}
    if len(examples) < len(wanted):
        raise UserError("a data file lost rows while it was read: start again when nothing writes to it")
    return [examples[index] for index in chosen]
