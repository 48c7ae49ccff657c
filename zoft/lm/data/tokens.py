"""Examples to token rows, and rows to left-padded batches, in the two layouts the option objectives read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm.data.completions import without_beginning
from zoft.lm.data.examples import Example
from zoft.lm.data.packing import num_shared, pack
from zoft.lm.data.rows import padded
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Token ids of every prompt and of every option behind it; of a generated answer, the gold one is the option.

    An option's tokens are what encoding ``prompt + option`` adds to encoding ``prompt`` in length (MeZO's rule), so a
    tokenizer that merges across the border is handled as the published protocol does. Rows too long are cut at the
    left, the first token (a beginning-of-text mark) kept, and room for a generated answer stays free in training too.

    Args:
        examples: what the task made.
        tokenizer: the model's.
        max_length: tokens kept of prompt and option together.

    Returns:
        Rows with ``sequences`` (ids of prompt + option, one list an option), ``lengths`` (tokens of each option),
        ``label``, and ``input_ids``, the longest sequence: what a length-grouped sampler measures. Where several
        options are right, ``also_right`` has the indices of the others; where answers are generated, ``answers`` has
        the gold ones.
    """
    # all prompts and then all prompts with options, in one call: a fast tokenizer works on lists
    texts = [e.prompt for e in examples] + [e.prompt + option for e in examples for option in e.options]
    whole = open_ended(texts, tokenizer)
    rows, first = [], len(examples)
    for example, prompt in zip(examples, whole[:first], strict=True):
        sequences = whole[first : first + len(example.options)]
        first += len(example.options)
        if not prompt:  # the first token of an answer is predicted from something
            mark = _first_token(tokenizer, example)
            prompt, sequences = [mark], [[mark, *ids] for ids in sequences]
        # MeZO's rule: what encoding prompt + option adds in length is the option
        lengths = [len(ids) - len(prompt) for ids in sequences]
        room = max_length - example.max_new_tokens
        _check_lengths(example, lengths, room)
        _refuse_alike(example, sequences)
        # each option's row is cut by itself: a long option takes more of its prompt away
        cut = [_cut(ids, room, tokenizer.bos_token_id) for ids in sequences]
        longest = max(cut, key=len)
        rows.append(
            {"sequences": cut, "lengths": lengths, "label": example.label, "input_ids": longest} | _gold(example)
        )
    return rows


def open_ended(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that something stands behind: without the marks that a tokenizer may put at a text's end."""
    *rows, empty, some = tokenizer([*texts, "", "a"])["input_ids"]
    # a text shares the marks at its beginning with the empty one, whose other marks are those of the end
    num_end = len(empty) - num_shared((empty, some))
    return [ids[: len(ids) - num_end] for ids in rows]


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, continued: bool = False
) -> list[Row]:
    """Token ids of the prompts alone: for answers that are generated, and for a classification head.

    Args:
        examples: what the task made.
        tokenizer: the model's.
        max_length: tokens kept of a prompt, with room for the answer that is generated behind it.
        continued: whether there is one; a head reads a text with the mark at its end, some at that very mark.

    Returns:
        Rows with ``input_ids`` and ``label``; and ``answers``, the gold ones, where answers are generated.
    """
    texts = [e.prompt for e in examples]
    prompts = open_ended(texts, tokenizer) if continued else tokenizer(texts)["input_ids"]
    return [
        {"input_ids": _cut(ids or [_first_token(tokenizer, e)], max_length - e.max_new_tokens, tokenizer.bos_token_id)}
        | {"label": e.label}
        | _gold(e)
        for e, ids in zip(examples, prompts, strict=True)
    ]


def _first_token(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    """What stands before an answer without a prompt, for a tokenizer that puts no mark at a text's beginning."""
    for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if mark is not None:
            return int(mark)
    raise UserError(
        f"nothing stands before the answers {example.options!s:.80}, and the tokenizer has no token that begins or "
        "ends a text: choose another task.prompt"
    )


def _gold(example: Example) -> Row:
    """What a metric knows beside the label."""
    known: Row = {"also_right": list(example.also_right)} if example.also_right else {}
    return known | ({"answers": list(example.answers)} if example.answers else {})


def _check_lengths(example: Example, lengths: list[int], room: int) -> None:
    assert lengths, "a masked model's example is for encode_masked, a classification head's for encode_prompts"
    if min(lengths) < 1:
        raise UserError(f"an option adds no token to its prompt: {example.options!r} behind {example.prompt[-40:]!r}")
    if max(lengths) >= room:
        reserve, mend = "", "raise task.max_length"
        if example.max_new_tokens:
            reserve = f", of which {example.max_new_tokens} stay free for an answer,"
            mend = "set fewer by objective.max_new_tokens, task.max_new_tokens or zoft generate max_new_tokens=N, or "
            mend += "raise task.max_length if the model takes more"
        raise UserError(
            f"max_length={room + example.max_new_tokens}{reserve} leaves no room for a prompt in front of an option of "
            f"{max(lengths)} tokens ({example.options!r}): {mend}"
        )


def _refuse_alike(example: Example, sequences: list[list[int]]) -> None:
    """Different answers that are the same tokens could never be told apart."""
    if len(set(map(tuple, sequences))) == len(set(example.options)):
        return
    places = [sequences.index(ids) for ids in sequences]
    a, b = next((first, place) for place, first in enumerate(places) if first != place)
    raise UserError(
        f"the answers {example.options[a]!r:.60} and {example.options[b]!r:.60} are the same tokens to this model's "
        "tokenizer (are they unknown to it?): choose other words, or another model"
    )


def _cut(ids: list[int], max_length: int, bos: int | None) -> list[int]:
    # the beginning-of-text mark stays: models have learnt to attend to it
    return without_beginning(ids, max(0, len(ids) - max_length), bos)


@dataclass
class OptionCollator:
    """Rows -> one left-padded batch.

    One row a prompt when every option of the batch is a single token behind the same prompt and all prompts have the
    same number of options; else one row an option, and beside it the same ``packed``
    (:func:`zoft.lm.data.packing.pack`) where that is much less to compute.

    Args:
        pad_token_id: fills the left.
        one_row_per_option: one row an option and nothing else, as MeZO's own batches are.
        multiple_of: pad lengths to a multiple of this.
    """

    pad_token_id: int
    one_row_per_option: bool = False
    multiple_of: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """One batch of tensors."""
        same_number = len({len(row["sequences"]) for row in rows}) == 1
        several_right = any("also_right" in row for row in rows)
        # one row a prompt needs options of one token, behind the same prompt, as many for every row
        one_row_each = same_number and not several_right and all(_single_tokens(row) for row in rows)
        if one_row_each and not self.one_row_per_option:
            # the option's token is not fed: it is predicted at the last position
            ids, mask = self._pad([row["sequences"][0][:-1] for row in rows])
            tokens = torch.tensor([[sequence[-1] for sequence in row["sequences"]] for row in rows])
            labels = torch.tensor([row["label"] for row in rows])
            return {"input_ids": ids, "attention_mask": mask, "option_tokens": tokens, "labels": labels}
        ids, mask = self._pad([sequence for row in rows for sequence in row["sequences"]])
        sizes = [len(row["sequences"]) for row in rows]
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "option_len": torch.tensor([length for row in rows for length in row["lengths"]]),
            "num_options": torch.tensor([size for size in sizes for _ in range(size)]),
            # the label stands in every row of its example, so that rows can be taken without a table
            "labels": torch.tensor([row["label"] for row, size in zip(rows, sizes, strict=True) for _ in range(size)]),
        }
        if several_right:
            batch["also_right"] = torch.tensor(
                [k in _right(row) for row, size in zip(rows, sizes, strict=True) for k in range(size)]
            )
        packed = None if self.one_row_per_option else pack(rows, self.pad_token_id)
        return batch if packed is None else batch | {"packed": packed}

    def _pad(self, sequences: list[list[int]]) -> tuple[Any, Any]:
        # to a multiple: fewer shapes to compile for
        ids = padded(sequences, self.pad_token_id, multiple_of=self.multiple_of)
        return ids, padded([[1] * len(sequence) for sequence in sequences], 0, multiple_of=self.multiple_of)


def _single_tokens(row: Row) -> bool:
    first, *others = row["sequences"]
    same_number = len({len(sequence) for sequence in row["sequences"]}) == 1
    return same_number and set(row["lengths"]) == {1} and all(sequence[:-1] == first[:-1] for sequence in others)


def _right(row: Row) -> list[int]:
    return [row["label"], *row.get("also_right", ())]
