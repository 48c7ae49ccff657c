"""What functions of other people return, as a float."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Real
from typing import Any


def number_of(value: Any) -> float | None:
    """A real number of any library as a float, None for everything else.

    Args:
        value: Python's, numpy's or torch's, also as an array or tensor without dimensions; True is 1 and False 0. Text
            is no number.

    Example:
        >>> import numpy, torch
        >>> [number_of(one) for one in (numpy.float32(0.5), torch.tensor(2), numpy.True_, "1", [1.0], 1j)]
        [0.5, 2.0, 1.0, None, None, None]
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # of a whole number or a fraction
        return math.inf
