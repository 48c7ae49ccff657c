"""Cross-entropy over the tokens that count in rows of text: completions, and what the assistant says in chats."""

from __future__ import annotations

from typing import Any

from zoft.lm.logits.call import arguments, called, inner
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.objectives._readout import Readout, of_hidden, of_losses
from zoft.lm.objectives.base import Batch
from zoft.utils.lazy import Tensor, nn, torch


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
    places, targets = predicted(batch)
    inputs = arguments(model, batch["input_ids"], batch["attention_mask"])
    return log_probs_at(model, inputs, places, targets), places.row


def predicted(batch: Batch) -> tuple[Positions, Tensor]:
    """The positions that predict the tokens that count, row by row, and those tokens [N]."""
    labels = batch["labels"][:, 1:]
    row, column = (labels >= 0).nonzero(as_tuple=True)
    return Positions(row, column - batch["labels"].shape[1]), labels[row, column]  # the position before predicts it


def readout_of_tokens(
    model: nn.Module, inputs: dict[str, Any], places: Positions, targets: Tensor, feedback: str
) -> Readout:
    """The loss of each token is a term of its own.

    Args:
        model: any causal language model.
        inputs: its keyword arguments.
        places: N positions.
        targets: [N] the tokens predicted there.
        feedback: hidden or loss.
    """
    unit = torch.arange(len(places), device=targets.device)
    if not len(places):  # no label counts: layers see their inputs, and nothing is read
        losses = called(model, inputs).flatten()[:0].float()
        if feedback != "hidden":
            return of_losses(losses, unit)
        none = losses.new_zeros(0, inner(model).config.get_text_config().hidden_size)
        return Readout(none, none, unit, torch.arange(none.shape[1], device=unit.device), losses, unit)
    if feedback == "hidden":
        return of_hidden(model, inputs, places, unit, terms=lambda log_probs: -log_probs, targets=targets)
    return of_losses(-log_probs_at(model, inputs, places, targets), unit)


def predictions_of_counted(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss of the tokens, each row's sum of losses [B], each row's number of tokens that count [B])."""
    log_probs, row = log_probs_of_counted(model, batch)
    sums = log_probs.new_zeros(len(batch["labels"])).index_add_(0, row, -log_probs)
    return -log_probs.mean(), sums, torch.bincount(row, minlength=len(sums))
