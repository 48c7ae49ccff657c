"""A model's own loss, read position by position without a trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from zoft.lm.logits.own_loss import own_loss
from zoft.lm.objectives._own_readout import is_seq2seq, own_places, own_readout
from zoft.step.positions import NodePositions, at_loss
from zoft.trainer.readout import last_tokens


class ModelReader:
    """Reads ``model(**batch)``'s loss.

    Args:
        model: a causal model or a classifier.
        feedback: as of the estimator.
    """

    def __init__(self, model: Any, feedback: str = "hidden") -> None:
        self.model = model
        self.feedback = feedback

    def parts(self, batch: Any) -> list[Any]:
        """The batch, or the micro-batches of a list."""
        return batch if isinstance(batch, list) else [batch]

    def places(self, part: Any) -> NodePositions:
        """The positions that the loss is read from."""
        with torch.no_grad():
            own_loss(self.model, **part)  # what the head can be asked for is tried here, as by the trainer
        positions = own_places(self.model, part)
        seen = part["labels" if is_seq2seq(self.model, part) else "input_ids"]
        return at_loss(positions.row, positions.column, torch.full((len(seen),), -seen.shape[1]))

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return DynamicCache()

    def tail(self, part: Any, last: int) -> Any:
        """The last tokens of each row alone."""
        return last_tokens(part, last)

    def read(self, part: Any) -> Any:
        """One forward."""
        return own_readout(self.model, part, self.feedback)
