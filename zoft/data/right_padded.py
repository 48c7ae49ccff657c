"""Rows of masked models and of classification heads to right-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zoft.lazy import torch

Row = dict[str, Any]


@dataclass
class RightPaddedCollator:
    """Rows with ``input_ids`` and ``label`` -> one right-padded batch.

    Args:
        pad_token_id: fills the right.

    Example:
        >>> rows = [{"input_ids": [0, 5, 3, 2], "label": 1, "mask_position": 2, "word_ids": [7, 8]}]
        >>> rows += [{"input_ids": [0, 3, 2], "label": 0, "mask_position": 1, "word_ids": [7, 8]}]
        >>> batch = RightPaddedCollator(1)(rows)
        >>> batch["input_ids"].tolist(), batch["mask_position"].tolist(), batch["labels"].tolist()
        ([[0, 5, 3, 2], [0, 3, 2, 1]], [2, 1], [1, 0])
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` [B, T], ``labels`` [B]; and ``mask_position`` [B], ``word_ids`` [B, C]."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[list[int]], filler: int) -> Any:
            return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": torch.tensor([row["label"] for row in rows]),
        }
        known = [name for name in ("mask_position", "word_ids") if name in rows[0]]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in known}
