"""Rows as the model will see them: tokens, which of them count, lengths, labels, what is cut; plain values for JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.lm.data.examples import Example, Rated

Facts = dict[str, Any]
_UNCUT = 2**30
_MANY = 20  # different rewards that are still counted one by one


@dataclass(frozen=True)
class Way:
    """How rows are put before the model.

    Args:
        form: a key of ``zoft.lm.formats.FORMS``.
        encode: (examples, max_length) -> the rows that training would have.
        max_length: tokens kept of a row.
        room: tokens of these that stay free for a text of the model's.
        compares: whether the loss is of all options, each behind the prompt, and not of the right one alone.
        writes: whether the model sees the prompt alone and its own text is judged: then nothing of the row counts.
    """

    form: str
    encode: Callable[[Sequence[Any], int], list[Facts]]
    max_length: int
    room: int = 0
    compares: bool = False
    writes: bool = False


def preview(examples: Sequence[Any], way: Way, tokenizer: Any, num_rows: int) -> Facts:
    """Facts of one split: rows, lengths, labels, and examples.

    Args:
        examples: of the split, all of one kind.
        way: how training would put them before the model.
        tokenizer: the model's.
        num_rows: how many of the first rows to show.

    Returns:
        ``rows``; ``tokens`` and ``counted`` (min, median, max, total); ``cut`` (rows, tokens); ``labels``, how often
        each stands there; ``first``, the first rows: ``where``, ``options``, ``answers`` or ``reward``, and ``parts``,
        each with ``text``, ``ids``, ``tokens``, ``counted``, ``cut`` and ``cut_end``.
    """
    parts = _parts(examples, way)
    rows = [row for named in parts for row in named.values()]
    cut = [row["cut"] + row["cut_end"] for row in rows]
    return {
        "rows": len(examples),
        "tokens": _spread([len(row["ids"]) for row in rows]),
        "counted": _spread([sum(row["counted"]) for row in rows]),
        "cut": {"rows": sum(map(bool, cut)), "tokens": sum(cut)},
        "labels": _labels(examples),
        "first": [
            _shown(example, named, tokenizer) for example, named in zip(examples[:num_rows], parts, strict=False)
        ],
    }


def _parts(examples: Sequence[Any], way: Way) -> list[dict[str, Facts]]:
    """For every example, what the model reads of it, by name."""
    rows = way.encode(examples, way.max_length)
    if way.form == "pairs":
        return [{side: _counted(row[side]) for side in ("chosen", "rejected")} for row in rows]
    if way.form == "counted":
        return [{"row": _counted(row)} for row in rows]
    could_be_cut = any(len(row["input_ids"]) >= way.max_length - way.room for row in rows)
    whole = way.encode(examples, _UNCUT) if could_be_cut else rows
    pairs = list(zip(rows, whole, strict=True))
    if way.writes:
        return [{"prompt": _prompt(row, uncut)} for row, uncut in pairs]
    if way.form in ("options", "generate"):
        return [{"right answer": _gold(row, uncut)} for row, uncut in pairs]
    return [{"row": _asked(row, uncut, masked=bool(examples[0].pieces))} for row, uncut in pairs]


def _counted(row: Facts) -> Facts:
    return {"ids": row["input_ids"], "counted": [label >= 0 for label in row["labels"]]} | _cuts(row)


def _asked(row: Facts, whole: Facts, *, masked: bool) -> Facts:
    """A text with a mask, at which a word is asked for, or a text for a classification head."""
    ids, cut = row["input_ids"], len(whole["input_ids"]) - len(row["input_ids"])
    counted = [place == row.get("mask_position") for place in range(len(ids))]
    return {"ids": ids, "counted": counted, "cut": 0 if masked else cut, "cut_end": cut if masked else 0}


def _gold(row: Facts, whole: Facts) -> Facts:
    """The right option behind its prompt."""
    label = row["label"]
    ids, length = row["sequences"][label], row["lengths"][label]
    counted = [place >= len(ids) - length for place in range(len(ids))]
    cut = len(whole["sequences"][label]) - len(ids)
    return {"ids": ids, "counted": counted, "cut": cut, "cut_end": 0}


def _prompt(row: Facts, whole: Facts) -> Facts:
    """What the model writes behind."""
    ids, cut = row["prompt_ids"], len(whole["prompt_ids"]) - len(row["prompt_ids"])
    return {"ids": ids, "counted": [False] * len(ids), "cut": cut, "cut_end": 0, "answers": row["answers"]}


def _cuts(row: Facts) -> Facts:
    return {"cut": row["cut"], "cut_end": row["cut_end"]}


def _shown(example: Any, named: dict[str, Facts], tokenizer: Any) -> Facts:
    shown: Facts = {"where": getattr(example, "where", None)}
    first = next(iter(named.values()))
    if isinstance(example, Rated):
        shown |= {} if example.reward is None else {"reward": example.reward}
    elif "answers" in first:
        shown["answers"] = first["answers"]
    elif isinstance(example, Example):
        lengths = first.get("lengths", [1] * len(example.options))
        shown["options"] = [
            {"text": text, "tokens": length, "right": place == example.label}
            for place, (text, length) in enumerate(zip(example.options, lengths, strict=True))
        ]
    return shown | {"parts": [{"name": name} | _part(row, tokenizer) for name, row in named.items()]}


def _part(row: Facts, tokenizer: Any) -> Facts:
    return {
        "text": tokenizer.decode(row["ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False),
        "ids": list(row["ids"]),
        "tokens": token_texts(row["ids"], tokenizer),
        "counted": row["counted"],
    } | _cuts(row)


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token as the text it stands for; of a part of a character, the tokenizer's own name."""
    texts = []
    for number, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        text = str(name).replace("▁", " ")  # sentencepiece's blank, which decoding one token would leave out
        if "▁" not in str(name):
            decoded = tokenizer.decode([number], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text = str(name) if "\ufffd" in decoded or not decoded else decoded
        texts.append(text)
    return texts


def _labels(examples: Sequence[Any]) -> dict[str, int]:
    """How often each answer is right; by its place where every row has choices of its own."""
    if isinstance(examples[0], Example) and not examples[0].options:
        names = [f"class {example.label}" for example in examples]
    elif isinstance(examples[0], Example):
        same = len({example.options for example in examples}) == 1
        names = [
            example.options[example.label].strip() if same else f"choice {example.label + 1}" for example in examples
        ]
    elif isinstance(examples[0], Rated) and len({str(example.reward) for example in examples}) <= _MANY:
        names = [str(example.reward) for example in examples if example.reward is not None]
    else:
        return {}
    return dict(sorted(Counter(names).items()))


def _spread(counts: list[int]) -> Facts:
    return {"min": min(counts), "median": statistics.median(counts), "max": max(counts), "total": sum(counts)}
