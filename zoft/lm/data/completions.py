"""Prompts with their completions to token rows whose completion counts, and such rows to left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.data.examples import Completion
from zoft.lm.data.packing import num_shared
from zoft.lm.data.rows import padded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
IGNORED = -100
"""The label where the loss does not look; PyTorch's and transformers' own."""


def encode_completions(
    examples: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Row]:
    """Token ids of prompt and completion, and which of them count: those that the prompt alone does not have.

    The text is encoded as a whole, so that it is cut into tokens as it will be when the model writes it; a token across
    the border counts. An end-of-text mark is added where the tokenizer has one, and counts: the model learns to stop.
    Of what is too long the prompt's beginning is cut (a beginning-of-text mark is kept), then the completion's end.

    Args:
        examples: what the task made.
        tokenizer: the model's.
        max_length: tokens kept.

    Returns:
        Rows with ``input_ids``, ``labels`` (the same ids, :data:`IGNORED` where they do not count), ``cut`` (how many
        tokens of the beginning) and ``cut_end`` (of the end).
    """
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    whole = tokenizer([e.prompt + e.completion for e in examples])["input_ids"]
    eos = tokenizer.eos_token_id
    rows = []
    for example, prompt, ids in zip(examples, prompts, whole, strict=True):
        begins = max(1, num_shared((prompt, ids)))  # nothing predicts the first token
        if begins >= len(ids):
            raise UserError(f"{example.where}: the completion adds no token to its prompt")
        if eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        cut = max(0, min(len(ids) - max_length, begins - 1))
        tail = without_beginning(ids, cut, tokenizer.bos_token_id)
        row = counted(tail[:max_length], range(begins - cut, min(len(tail), max_length)))
        rows.append(row | {"cut": cut, "cut_end": max(0, len(tail) - max_length)})
    return rows


def counted(ids: list[int], which: Any) -> Row:
    """A row of which the tokens at the places ``which`` count.

    Example:
        >>> counted([5, 6, 7], {2})
        {'input_ids': [5, 6, 7], 'labels': [-100, -100, 7]}
    """
    return {"input_ids": ids, "labels": [token if place in which else IGNORED for place, token in enumerate(ids)]}


def without_beginning(ids: list[int], cut: int, bos: int | None) -> list[int]:
    """The ids without ``cut`` of the first ones; a beginning-of-text mark stays and the next ones go.

    Example:
        >>> without_beginning([0, 5, 6, 7], 2, bos=0), without_beginning([4, 5, 6, 7], 2, bos=0)
        ([0, 7], [6, 7])
    """
    marked = cut and bos is not None and ids[0] == bos
    return [ids[0], *ids[1 + cut :]] if marked else ids[cut:]


@dataclass
class CountedCollator:
    """Rows with ``input_ids`` and ``labels`` -> one left-padded batch.

    Args:
        pad_token_id: fills the left of the ids; labels are filled with :data:`IGNORED`.

    Example:
        >>> batch = CountedCollator(0)([counted([5, 6, 7], {2}), counted([8, 9], {1})])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [0, 8, 9]], [[-100, -100, 7], [-100, -100, 9]])
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One batch: ``input_ids``, ``attention_mask`` and ``labels``, [B, T] each."""
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
