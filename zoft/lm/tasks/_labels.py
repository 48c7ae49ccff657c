"""Which labels are one: numbers and blanks by one rule, whatever kind of file they stand in."""

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

    Blanks at the ends are left out and those inside count as one; a number, or a text that is written as one, loses the
    zeros that say nothing; true and false are labels whatever their case. Null, NaN and a text of blanks are no label.

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
    """A label as it is shown, and as its own word: in one spelling of its characters, with single blanks."""
    return " ".join(unicodedata.normalize("NFC", str(value)).split())


def in_order(label: str) -> tuple[bool, Decimal, str]:
    """What labels are sorted by: numbers by their size, and then texts by the alphabet.

    Example:
        >>> sorted(["b", "10", "-1", "a", "9", "0.5"], key=in_order)
        ['-1', '0.5', '9', '10', 'a', 'b']
    """
    is_number = bool(_NUMBER.fullmatch(label))
    return (not is_number, Decimal(label) if is_number else Decimal(0), label)
