"""How times, sizes and numbers are said, the same on the bar, in the report and in the files."""

from __future__ import annotations

import math
from typing import Any


def duration(seconds: float) -> str:
    """Seconds as a clock shows them.

    Args:
        seconds: >= 0.

    Returns:
        mm:ss, or h:mm:ss from one hour on.

    Example:
        >>> duration(72), duration(3725)
        ('01:12', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


def gib(mb: float) -> str:
    """A size in MiB as GiB.

    Example:
        >>> gib(625)
        '0.61 GiB'
    """
    return f"{mb / 1024:.2f} GiB"


def finite(value: Any) -> Any:
    """The value as JSON can say it: None in place of every number that is not finite, at any depth.

    Example:
        >>> finite({"loss": float("nan"), "interval": (0.5, float("inf"))})
        {'loss': None, 'interval': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
