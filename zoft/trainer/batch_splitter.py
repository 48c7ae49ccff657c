"""Split micro-batches when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from zoft.errors import OutOfMemoryError
from zoft.lm.data.rows import groups_of, take

log = logging.getLogger(__name__)

T = TypeVar("T")


class BatchSplitter:
    """Asks again with micro-batches of half the size when memory does not suffice; the smaller size stays.

    Example:
        >>> splitter = BatchSplitter()
        >>> splitter(lambda window: len(window), [{"input_ids": [[1], [2]]}])
        1
    """

    def __init__(self) -> None:
        self.parts = 1

    def __call__(self, ask: Callable[[list[dict[str, Any]]], T], window: list[dict[str, Any]]) -> T:
        """The answer, from the largest micro-batches that fit.

        Args:
            ask: what needs the memory; leaves everything as it was when it raises.
            window: the step's micro-batches.

        Raises:
            OutOfMemoryError: single examples do not fit either.
        """
        while True:
            try:
                return ask(_cut(window, self.parts))
            except OutOfMemoryError:
                if self.parts >= max(len(groups_of(inputs)) for inputs in window):
                    raise
                self.parts *= 2
                log.warning("out of memory: the step is asked again in micro-batches of 1/%d the size", self.parts)


def _cut(window: list[dict[str, Any]], parts: int) -> list[dict[str, Any]]:
    """Every micro-batch in so many, or as many as it has examples."""
    if parts == 1:
        return window
    pieces = []
    for inputs in window:
        groups = groups_of(inputs)
        size = -(-len(groups) // parts)
        for start in range(0, len(groups), size):
            pieces.append(take(inputs, [row for group in groups[start : start + size] for row in group]))
    return pieces
