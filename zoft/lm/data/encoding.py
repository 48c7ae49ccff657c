"""How examples of each kind become token rows and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from zoft.lm.data.chat import encode_chats
from zoft.lm.data.completions import CountedCollator, Row, encode_completions
from zoft.lm.data.examples import Chat, Completion
from zoft.lm.data.tokens import OptionCollator, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODERS: dict[type, Callable[..., list[Row]]] = {Completion: encode_completions, Chat: encode_chats}


def encode_examples(examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Token rows of one split's examples, whatever their kind.

    Args:
        examples: what a task made, all of one kind.
        tokenizer: the model's.
        max_length: tokens kept of a row.
    """
    return _ENCODERS.get(type(examples[0]), encode)(examples, tokenizer, max_length)


def are_counted(rows: Sequence[Row]) -> bool:
    """Whether these are rows whose labels say which tokens count, and not rows of answer options."""
    return "sequences" not in rows[0] and isinstance(rows[0].get("labels"), list)


def collator_of(rows: Sequence[Row], pad_token_id: int, *, as_mezo: bool = False) -> Any:
    """What makes batches of such rows.

    Args:
        rows: what :func:`encode_examples` gave.
        pad_token_id: fills the left.
        as_mezo: batches as MeZO's published code makes them.
    """
    if are_counted(rows):
        return CountedCollator(pad_token_id)
    return OptionCollator(pad_token_id, one_row_per_option=as_mezo, multiple_of=8 if as_mezo else 1)
