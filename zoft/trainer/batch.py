"""StepBatch: the rows of one optimisation step, and how they are cut where memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zoft.errors import OutOfMemoryError
from zoft.lm.data.rows import groups_of, take

log = logging.getLogger(__name__)

Inputs = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class StepBatch:
    """Micro-batches whose losses are one loss.

    Args:
        micro_batches: what the collator made, on the device.
        num_items: labels that count in all of them, over all processes; None where it is unknown, or no model asks.
        of_each: whether its loss is that of each example, and not their mean.

    Example:
        >>> import torch
        >>> StepBatch([{"input_ids": torch.tensor([[1], [2]])}]).cut(2).micro_batches
        [{'input_ids': tensor([[1]])}, {'input_ids': tensor([[2]])}]
    """

    micro_batches: Sequence[Inputs]
    num_items: Any = None
    of_each: bool = False

    def cut(self, parts: int) -> StepBatch:
        """Every micro-batch cut into ``parts``, or into single examples where it has fewer."""
        if parts == 1:
            return self
        pieces = []
        for inputs in self.micro_batches:
            # groups of rows that belong together (the options of one example) are never cut apart
            groups = groups_of(inputs)
            # ceil(groups / parts): no part is empty
            size = -(-len(groups) // parts)
            for start in range(0, len(groups), size):
                pieces.append(take(inputs, [row for group in groups[start : start + size] for row in group]))
        return replace(self, micro_batches=pieces)

    @property
    def num_examples(self) -> int:
        """Examples of the largest micro-batch: into more parts it cannot be cut."""
        return max(len(groups_of(inputs)) for inputs in self.micro_batches)


@dataclass
class BatchSplitter:
    """Asks again with micro-batches of half the size when memory does not suffice; the smaller size stays.

    Args:
        parts: into how many micro-batches are cut to begin with.

    Example:
        >>> splitter = BatchSplitter()
        >>> splitter(lambda batch: len(batch.micro_batches), StepBatch([{"input_ids": [[1], [2]]}]))
        1
    """

    parts: int = 1

    def __call__(self, ask: Callable[[StepBatch], T], batch: StepBatch) -> T:
        """The answer, from the largest micro-batches that fit.

        Args:
            ask: what needs the memory; leaves everything as it was when it raises.
            batch: the step's.

        Raises:
            OutOfMemoryError: single examples do not fit either.
        """
        # ends: parts double until a part is a single example
        while True:
            try:
                return ask(batch.cut(self.parts))
            except OutOfMemoryError:
                # a step of single examples cannot be made smaller
                if self.parts >= batch.num_examples:
                    raise
                # kept for later steps: the same size would run out of memory again
                self.parts *= 2
                log.warning("out of memory: the step is asked again in micro-batches of 1/%d the size", self.parts)
