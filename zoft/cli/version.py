"""`zoft version`."""

from __future__ import annotations

import zoft
from zoft.errors import UserError


def command(arguments: list[str]) -> int:
    """Print the version."""
    if arguments:
        raise UserError(f"zoft version takes no arguments, got {arguments[0]!r}")
    print(f"zoft {zoft.__version__}")
    return 0
