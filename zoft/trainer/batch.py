"""StepBatch: the rows of one optimisation step, as the Trainer's loop has collected them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoft.lm.data.rows import groups_of, take

Inputs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class StepBatch:
    """Micro-batches whose losses are one loss.

    Args:
        micro_batches: what the collator made, on the device.
        num_items: labels that count in all of them, over all processes; None where it is unknown, or no model asks.

    Example:
        >>> import torch
        >>> StepBatch([{"input_ids": torch.tensor([[1], [2]])}]).cut(2).micro_batches
        [{'input_ids': tensor([[1]])}, {'input_ids': tensor([[2]])}]
    """

    micro_batches: Sequence[Inputs]
    num_items: Any = None

    def cut(self, parts: int) -> StepBatch:
        """Every micro-batch cut into ``parts``, or into single examples where it has fewer.

        Args:
            parts: 1 leaves the batch as it is.
        """
        if parts == 1:
            return self
        pieces = []
        for inputs in self.micro_batches:
            groups = groups_of(inputs)
            size = -(-len(groups) // parts)
            for start in range(0, len(groups), size):
                pieces.append(take(inputs, [row for group in groups[start : start + size] for row in group]))
        return replace(self, micro_batches=pieces)

    @property
    def num_examples(self) -> int:
        """Examples of the largest micro-batch: into more parts it cannot be cut."""
        return max(len(groups_of(inputs)) for inputs in self.micro_batches)
