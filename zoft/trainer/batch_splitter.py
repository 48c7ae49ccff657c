"""Split micro-batches when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from zoft.errors import OutOfMemoryError
from zoft.trainer.batch import StepBatch

log = logging.getLogger(__name__)

T = TypeVar("T")


class BatchSplitter:
    """Asks again with micro-batches of half the size when memory does not suffice; the smaller size stays.

    Args:
        parts: into how many micro-batches are cut to begin with.

    Example:
        >>> splitter = BatchSplitter()
        >>> splitter(lambda batch: len(batch.micro_batches), StepBatch([{"input_ids": [[1], [2]]}]))
        1
    """

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def __call__(self, ask: Callable[[StepBatch], T], batch: StepBatch) -> T:
        """The answer, from the largest micro-batches that fit.

        Args:
            ask: what needs the memory; leaves everything as it was when it raises.
            batch: the step's.

        Raises:
            OutOfMemoryError: single examples do not fit either.
        """
        while True:
            try:
                return ask(batch.cut(self.parts))
            except OutOfMemoryError:
                if self.parts >= batch.num_examples:
                    raise
                self.parts *= 2
                log.warning("out of memory: the step is asked again in micro-batches of 1/%d the size", self.parts)
