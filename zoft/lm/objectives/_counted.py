"""Cross-entropy over the tokens that count in rows of text: completions, and what the assistant says in chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.lm.logits.call import arguments
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.objectives.base import Batch
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_counted(batch: Batch) -> bool:
    """Whether the batch has a label for every token, [B, T]; labels of options are [B]."""
    return batch["labels"].dim() == 2


def num_counted(batch: Batch) -> int:
    """How many tokens count."""
    return int((batch["labels"] >= 0).sum())


def log_probs_of_counted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of every token that counts.

    Args:
        model: any causal language model.
        batch: left-padded ``input_ids``, ``attention_mask`` and ``labels``, [B, T]; labels below 0 do not count.

    Returns:
        float32 [N], row by row, and the row of each, int64 [N].
    """
    labels = batch["labels"][:, 1:]
    row, column = (labels >= 0).nonzero(as_tuple=True)
    places = Positions(row, column - batch["labels"].shape[1])  # the position before the token predicts it
    inputs = arguments(model, batch["input_ids"], batch["attention_mask"])
    return log_probs_at(model, inputs, places, labels[row, column]), row


def predictions_of_counted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss of the tokens, each row's sum of losses [B], each row's number of tokens that count [B])."""
    log_probs, row = log_probs_of_counted(model, batch)
    sums = log_probs.new_zeros(len(batch["labels"])).index_add_(0, row, -log_probs)
    return -log_probs.mean(), sums, torch.bincount(row, minlength=len(sums))
