"""Prompts whose answers the model writes, to token rows and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.lm.data.completions import CountedCollator
from zoft.lm.data.examples import Completion, Example, Rated
from zoft.lm.data.tokens import OptionCollator, encode, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def encode_generated(
    examples: Sequence[Example | Completion | Rated],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_new_tokens: int,
    *,
    as_mezo: bool = False,
) -> list[Row]:
    """Token ids of the prompt alone, and of the prompt with the gold answer where there is one.

    Args:
        examples: a task's, completions (whose text is the gold answer), or prompts with rewards.
        tokenizer: the model's.
        max_length: tokens kept, with room for the answer.
        max_new_tokens: that room.
        as_mezo: a prompt is what is left of it when it is cut together with its gold answer, as MeZO's published code
            does, and not what fits alone.

    Returns:
        Rows with ``prompt_ids``, ``prompt`` (the text), ``answers`` (what a score is computed from) and ``input_ids``;
        and, but for rewards, what :func:`zoft.lm.data.tokens.encode` gives of the gold answer.
    """
    plain = [_plain(example, max_new_tokens) for example in examples]
    prompts = encode_prompts(plain, tokenizer, max_length, continued=True)
    rows = (
        [{"input_ids": row["input_ids"]} for row in prompts]
        if isinstance(examples[0], Rated)
        else encode(plain, tokenizer, max_length)
    )
    if as_mezo and "sequences" in rows[0]:
        prompts = [{"input_ids": row["sequences"][0][: -row["lengths"][0]]} for row in rows]
    return [
        row | {"prompt_ids": prompt["input_ids"], "prompt": plain_row.prompt, "answers": answers}
        for row, prompt, plain_row, answers in zip(rows, prompts, plain, map(_answers, examples), strict=True)
    ]


def _plain(example: Example | Completion | Rated, room: int) -> Example:
    if isinstance(example, Example):
        return example
    written = (example.completion,) if isinstance(example, Completion) else ()
    return Example(example.prompt, written, 0, max_new_tokens=room)


def _answers(example: Example | Completion | Rated) -> list[Any]:
    if isinstance(example, Rated):
        return [example.reward]
    return [example.completion.strip()] if isinstance(example, Completion) else list(example.answers)


@dataclass
class GeneratedCollator:
    """Rows -> one batch: the gold answers as an :class:`OptionCollator` has them, and the prompts as lists.

    Args:
        pad_token_id: fills the left.
        answering: what the batch carries to say how answers are written and read.
        as_mezo: batches as MeZO's published code makes them.
    """

    pad_token_id: int
    answering: Any
    as_mezo: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One batch: tensors, and ``prompt_ids``, ``prompts`` and ``answers``, lists of one entry a row."""
        if "sequences" in rows[0]:
            collate = OptionCollator(self.pad_token_id, self.as_mezo, 8 if self.as_mezo else 1)
            batch = collate(rows)
        else:
            unlabelled = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])} for row in rows]
            batch = CountedCollator(self.pad_token_id)(unlabelled)
            del batch["labels"]
        return batch | {
            "prompt_ids": [row["prompt_ids"] for row in rows],
            "prompts": [row["prompt"] for row in rows],
            "answers": [row["answers"] for row in rows],
            "answering": self.answering,
        }
