"""Rows that stand in a run more than once, word for word: in train and held out, or twice in one split."""

from __future__ import annotations

import dataclasses
import logging
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from zoft.lm.data.examples import Example, PreferencePair, Rated
from zoft.lm.tasks.base import Splits

log = logging.getLogger(__name__)
_SPLITS = ("train", "dev", "test")


def content_of(example: Any) -> Hashable:
    """What the model is given of a row, without its place in the file, needless blanks and marks that are not seen.

    A label is no part of it: a text that is held out under another label than in train is known all the same. Neither
    is the order of a row's choices, nor which of two answers is the better one.

    Example:
        >>> content_of(Example("a  b", (" x", " y"), 0)) == content_of(Example("a b ", (" y", " x"), 1))
        True
    """
    if isinstance(example, Example):
        pieces = tuple(piece.text for piece in example.pieces)
        answers = frozenset(map(_plain, (*example.options, *example.answers)))
        return (_plain(example.prompt), _plain(pieces), answers)
    if isinstance(example, PreferencePair):
        return frozenset(map(content_of, (example.chosen, example.rejected)))
    if isinstance(example, Rated):
        return _plain(example.prompt)
    fields = dataclasses.fields(example)
    return tuple(_plain(getattr(example, field.name)) for field in fields if field.name != "where")


def repeated(examples: Sequence[Any], known: Sequence[Any]) -> int:
    """How many of the examples stand in the known rows too: a metric on them measures memory.

    Example:
        >>> rows = [Example("a", (" b", " c"), 0), Example("d", (" b", " c"), 1)]
        >>> repeated(rows, rows[:1])
        1
    """
    contents = set(map(content_of, known))
    return sum(content_of(example) in contents for example in examples)


def notes(splits: Splits) -> list[str]:
    """A sentence for every two splits that share rows, and for every split that has rows twice.

    Example:
        >>> one, two = Example("a", (" b",), 0), Example("d", (" b",), 0)
        >>> notes(Splits(train=[one, one], dev=[two], test=[one]))
        ['1 of 1 test rows stands in train too: a metric on them measures memory', '1 of 2 train rows repeats another']
    """
    lines = []
    for held, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        rows = getattr(splits, held)
        count = repeated(rows, getattr(splits, other))
        if count:
            why = "a metric on them measures memory" if other == "train" else "the best checkpoint is chosen by them"
            stand = "stands" if count == 1 else "stand"
            lines.append(f"{count:,} of {len(rows):,} {held} rows {stand} in {other} too: {why}")
    for name in _SPLITS:
        rows = getattr(splits, name)
        count = len(rows) - len(set(map(content_of, rows)))
        if count:
            lines.append(f"{count:,} of {len(rows):,} {name} rows {'repeats' if count == 1 else 'repeat'} another")
    return lines


def warn(splits: Splits) -> None:
    """Log :func:`notes`: what is about to be trained on, evaluated or shown."""
    for note in notes(splits):
        log.warning(note)


def _plain(value: Any) -> Hashable:
    if isinstance(value, str):
        if not value.isascii():  # one spelling of each character, and none that are not seen (zero-width, soft hyphens)
            value = unicodedata.normalize("NFC", "".join(c for c in value if unicodedata.category(c) != "Cf"))
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return tuple(sorted((key, _plain(part)) for key, part in value.items()))
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
