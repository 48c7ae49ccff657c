"""How examples of each kind become token rows and batches; of preference pairs two rows each, the better one first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.lm.data.chat import encode_chats
from zoft.lm.data.completions import CountedCollator, Row, encode_completions
from zoft.lm.data.examples import Chat, Completion, PreferencePair
from zoft.lm.data.tokens import OptionCollator, encode
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODERS: dict[type, Callable[..., list[Row]]] = {Completion: encode_completions, Chat: encode_chats}


def encode_examples(examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Token rows of one split's examples, all of one kind; of each, ``max_length`` tokens are kept."""
    return _ENCODERS.get(type(examples[0]), encode)(examples, tokenizer, max_length)


def are_counted(rows: Sequence[Row]) -> bool:
    """Whether these are rows whose labels say which tokens count, and not rows of answer options."""
    return "sequences" not in rows[0] and isinstance(rows[0].get("labels"), list)


def collator_of(rows: Sequence[Row], pad_token_id: int, *, as_mezo: bool = False) -> Any:
    """What makes batches of such rows; ``pad_token_id`` fills the left, ``as_mezo`` is MeZO's published code."""
    if are_counted(rows):
        return CountedCollator(pad_token_id)
    return OptionCollator(pad_token_id, one_row_per_option=as_mezo, multiple_of=8 if as_mezo else 1)


def encode_pairs(examples: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Rows with ``chosen`` and ``rejected``, of a completion or a chat each, and the longer one's ``input_ids``.

    Of each answer with its prompt ``max_length`` tokens are kept.
    """
    sides = [[example.chosen for example in examples], [example.rejected for example in examples]]
    chosen, rejected = (_encoded(side, tokenizer, max_length) for side in sides)
    return [
        {"chosen": better, "rejected": worse, "input_ids": max(better["input_ids"], worse["input_ids"], key=len)}
        for better, worse in zip(chosen, rejected, strict=True)
    ]


def _encoded(examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """One side's rows; a pair may hold completions and the next one chats."""
    rows: dict[int, Row] = {}
    for kind in {type(example) for example in examples}:
        places = [place for place, example in enumerate(examples) if type(example) is kind]
        encoded = encode_examples([examples[place] for place in places], tokenizer, max_length)
        rows |= dict(zip(places, encoded, strict=True))
    return [rows[place] for place in range(len(examples))]


@dataclass
class PairCollator:
    """Pairs -> one left-padded batch of twice as many rows.

    Args:
        pad_token_id: fills the left.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` [2 B, T]; ``num_options`` and, if known, ``reference`` [2 B].

        ``labels`` are below 0 where the loss does not look; ``num_options`` is 2, which keeps a pair's rows together.
        """
        both = [row[side] for row in rows for side in ("chosen", "rejected")]
        batch = CountedCollator(self.pad_token_id)(both) | {"num_options": torch.full((len(both),), 2)}
        if all("reference" in row for row in rows):
            batch["reference"] = torch.tensor([value for row in rows for value in row["reference"]])
        return batch
