"""Rows as the model will see them: tokens, which of them count, lengths, labels, what is cut; plain values for JSON."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from zoft.data.encoding import are_counted, encode_examples
from zoft.data.examples import Preference, Rated
from zoft.data.masked import encode_masked
from zoft.data.tokens import encode_prompts
from zoft.tasks.base import Example

Facts = dict[str, Any]
_UNCUT = 2**30
_MANY = 20  # different rewards that are still counted one by one


def preview(examples: Sequence[Any], tokenizer: Any, max_length: int, objective: str, num_rows: int) -> Facts:
    """What there is to know of one split.

    Args:
        examples: of the split, all of one kind.
        tokenizer: the model's.
        max_length: tokens kept of a row.
        objective: its name: ``options`` counts every option's tokens, others the right one's.
        num_rows: how many of the first rows to show.

    Returns:
        ``rows``; ``tokens`` and ``counted`` (min, median, max, total); ``cut`` (rows, tokens); ``labels``, how often
        each stands there; ``first``, the first rows: ``where``, ``options`` or ``reward``, and ``parts``, each with
        ``text``, ``ids``, ``tokens``, ``counted``, ``cut`` and ``cut_end``.
    """
    parts = _parts(examples, tokenizer, max_length)
    rows = [row for named in parts for row in named.values()]
    cut = [row["cut"] + row["cut_end"] for row in rows]
    return {
        "rows": len(examples),
        "tokens": _spread([len(row["ids"]) for row in rows]),
        "counted": _spread([_num_counted(row, objective) for row in rows]),
        "cut": {"rows": sum(map(bool, cut)), "tokens": sum(cut)},
        "labels": _labels(examples),
        "first": [
            _shown(example, named, tokenizer) for example, named in zip(examples[:num_rows], parts, strict=False)
        ],
    }


def repeated(examples: Sequence[Any], train: Sequence[Any]) -> int:
    """How many of the examples stand in the training rows too, word for word: a metric on them measures memory.

    Example:
        >>> rows = [Example("a", (" b", " c"), 0), Example("d", (" b", " c"), 1)]
        >>> repeated(rows, rows[:1])
        1
    """
    known = {_content(example) for example in train}
    return sum(_content(example) in known for example in examples)


def _content(example: Any) -> str:
    return str({name: value for name, value in vars(example).items() if name != "where"})


def _parts(examples: Sequence[Any], tokenizer: Any, max_length: int) -> list[dict[str, Facts]]:
    """For every example, what the model reads of it, by name."""
    kind = type(examples[0])
    if kind is Preference:
        chosen = _parts([example.chosen for example in examples], tokenizer, max_length)
        rejected = _parts([example.rejected for example in examples], tokenizer, max_length)
        return [{"chosen": a["row"], "rejected": b["row"]} for a, b in zip(chosen, rejected, strict=True)]
    if kind is Rated:
        prompts = tokenizer([example.prompt for example in examples])["input_ids"]
        return [{"prompt": _prompt(ids, max_length)} for ids in prompts]
    encoded = _encoded(examples, tokenizer, max_length)
    if are_counted(encoded):
        return [
            {"row": {"ids": r["input_ids"], "counted": [label >= 0 for label in r["labels"]]} | _cuts(r)}
            for r in encoded
        ]
    room = max_length - max(getattr(example, "max_new_tokens", 0) for example in examples)
    could_be_cut = any(len(row["input_ids"]) >= room for row in encoded)
    whole = _encoded(examples, tokenizer, _UNCUT) if could_be_cut else encoded
    pairs = list(zip(encoded, whole, strict=True))
    if "sequences" in encoded[0]:
        return [{"right answer": _gold(row, uncut)} for row, uncut in pairs]
    return [{"row": _asked(row, uncut, masked=bool(examples[0].pieces))} for row, uncut in pairs]


def _encoded(examples: Sequence[Any], tokenizer: Any, max_length: int) -> list[Facts]:
    """The rows, for masked models and classification heads too."""
    if isinstance(examples[0], Example) and examples[0].pieces:
        return encode_masked(examples, tokenizer, max_length)
    if isinstance(examples[0], Example) and not examples[0].options:
        return encode_prompts(examples, tokenizer, max_length)
    return encode_examples(examples, tokenizer, max_length)


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
    return {"ids": ids, "counted": counted, "cut": cut, "cut_end": 0, "lengths": row["lengths"]}


def _prompt(ids: list[int], max_length: int) -> Facts:
    kept = ids[max(0, len(ids) - max_length) :]
    return {"ids": kept, "counted": [False] * len(kept), "cut": len(ids) - len(kept), "cut_end": 0}


def _cuts(row: Facts) -> Facts:
    return {"cut": row["cut"], "cut_end": row["cut_end"]}


def _num_counted(row: Facts, objective: str) -> int:
    return sum(row["lengths"]) if objective == "options" and "lengths" in row else sum(row["counted"])


def _shown(example: Any, named: dict[str, Facts], tokenizer: Any) -> Facts:
    shown: Facts = {"where": getattr(example, "where", None)}
    if isinstance(example, Example):
        lengths = next(iter(named.values())).get("lengths", [1] * len(example.options))
        shown["options"] = [
            {"text": text, "tokens": length, "right": place == example.label}
            for place, (text, length) in enumerate(zip(example.options, lengths, strict=True))
        ]
    if isinstance(example, Rated):
        shown["reward"] = example.reward
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
        names = [str(example.reward) for example in examples]
    else:
        return {}
    return dict(sorted(Counter(names).items()))


def _spread(counts: list[int]) -> Facts:
    return {"min": min(counts), "median": statistics.median(counts), "max": max(counts), "total": sum(counts)}
