"""`zoft version`."""

from __future__ import annotations

import zoft


def command(arguments: list[str]) -> int:
    """Print the version.

    Args:
        arguments: none.
    """
    del arguments
    print(f"zoft {zoft.__version__}")
    return 0
