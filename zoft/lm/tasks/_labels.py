"""Which spellings are the same label: one rule for numbers and blanks, whatever kind of file they stand in."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from zoft.errors import UserError

_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?")
_KINDS: dict[type, str] = {list: "a list", dict: "a mapping", bytes: "bytes"}


def label_key(value: Any) -> str | None:
    """A label as the text it is compared by; None where there is no label.

    Blanks and marks that are not seen (a zero-width space) are left out at the ends, and blanks inside count as one; a
    number, or a text that is written as one, loses the zeros that say nothing; true and false are labels whatever their
    case. Null, NaN and a text of blanks are no label.

    Raises:
        UserError: a list, a mapping, or another value that is neither text nor a number.

    Example:
        >>> [label_key(value) for value in (1, 1.0, "1", " 1.0 ", "01", True, "TRUE", "very  good ", "", None)]
        ['1', '1', '1', '1', '01', 'true', 'true', 'very good', None, None]
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float) or (isinstance(value, float) and math.isinf(value)):
        what = "infinite" if isinstance(value, float) else _KINDS.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"a label must be a word or a number, got {what}")
    text = spelled(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    if isinstance(value, float) or _NUMBER.fullmatch(text):
        number = Decimal(text)
        return f"{number.normalize():f}" if number else "0"
    return text or None


def spelled(value: Any) -> str:
    r"""A label as it is shown, and as its own word: in one spelling of its characters, with single blanks.

    Example:
        >>> spelled(" very  good\u200b")
        'very good'
    """
    text = " ".join(unicodedata.normalize("NFC", str(value)).split())
    start, end = 0, len(text)
    while start < end and _is_unseen(text[start]):
        start += 1
    while start < end and _is_unseen(text[end - 1]):
        end -= 1
    return text[start:end]


def look(label: str) -> str:
    r"""A label without case and marks: labels that share it are one label that was misspelt.

    Example:
        >>> look("Pos") == look("pos"), look("\uff11") == look("1"), look("po\u200bs") == look("pos")
        (True, True, True)
    """
    return "".join(c for c in unicodedata.normalize("NFKC", label).casefold() if not _is_unseen(c))


def _is_unseen(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) == "Cf"


def in_order(label: str) -> tuple[bool, Decimal, str]:
    """The sort key of labels: numbers by their size, and then texts by the alphabet.

    Example:
        >>> sorted(["b", "10", "-1", "a", "9", "0.5"], key=in_order)
        ['-1', '0.5', '9', '10', 'a', 'b']
    """
    is_number = bool(_NUMBER.fullmatch(label))
    return (not is_number, Decimal(label) if is_number else Decimal(0), label)
