"""Examples for masked models to token rows: pieces encoded one by one, the mask's place, and the token of each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.rows import padded
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]


def encode_masked(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Token ids of every text, its pieces encoded separately, between the tokenizer's first and last token.

    Without a mask (a classification head's text) each piece ends with the last token. Rows too long are cut at the end.

    Args:
        examples: what a masked task made.
        tokenizer: the model's.
        max_length: tokens kept of a text, first and last token included.

    Returns:
        Rows with ``input_ids`` and ``label``; and, where there is a mask, ``mask_position`` (its index in
        ``input_ids``) and ``word_ids`` (the token of each option, in the order of the labels).

    Raises:
        UserError: a tokenizer without a mask, a word of several tokens, or a mask behind ``max_length``.

    References: Gao et al. 2021 (LM-BFF), as published with MeZO (medium_models).
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no mask token: a masked task needs a masked language model and its "
            "tokenizer, e.g. model.name=FacebookAI/roberta-large"
        )
    words: dict[str, int] = {}
    return [_row(example, tokenizer, max_length, words) for example in examples]


def _row(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, words: dict[str, int]) -> Row:
    masked = any(piece.text is None for piece in example.pieces)
    ids, position = [tokenizer.cls_token_id], None
    for piece in example.pieces:
        if piece.text is None:
            position = len(ids)
            ids.append(tokenizer.mask_token_id)
            continue
        ids += _ids(piece.text, tokenizer)[: piece.limit or None]
        if not masked:
            ids.append(tokenizer.sep_token_id)
    if masked:
        ids.append(tokenizer.sep_token_id)
    row = {"input_ids": ids[:max_length], "label": example.label}
    if position is None:
        return row
    if position >= max_length:
        shown = " ".join(piece.text or "" for piece in example.pieces)[:60]
        raise UserError(
            f"max_length={max_length} cuts off the mask, token {position + 1} of {shown!r}: raise task.max_length"
        )
    for word in example.options:
        if word not in words:
            words[word] = _single(word, tokenizer)
    if len({words[word] for word in example.options}) < len(set(example.options)):
        raise UserError(f"two of the label words {example.options!s:.120} are one token to this tokenizer: use others")
    return row | {"mask_position": position, "word_ids": [words[word] for word in example.options]}


def _single(word: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = _ids(word, tokenizer)
    if len(ids) != 1:
        raise UserError(
            f"the label word {word.strip()!r} is {len(ids)} tokens to this tokenizer, and a mask holds one: "
            "use a model that has it as one, e.g. model.name=FacebookAI/roberta-large"
        )
    return int(ids[0])


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- Rows of masked models and of classification heads to right-padded batches ---------------------------------------


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
        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id, left=False),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0, left=False),
            "labels": torch.tensor([row["label"] for row in rows]),
        }
        known = [name for name in ("mask_position", "word_ids") if name in rows[0]]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in known}
