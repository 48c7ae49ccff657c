"""One line on the terminal, beside a progress bar that is being drawn."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from tqdm import tqdm


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line without breaking a progress bar that is being drawn.

    Args:
        text: the line.
        file: where to; standard output when None.

    Example:
        >>> say("zero-shot accuracy 62.4 %")
        zero-shot accuracy 62.4 %
    """
    stream = file or sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()  # a pipe keeps its text back otherwise, and it would come after the bar's lines


def columns(stream: TextIO) -> int:
    """How many characters fit on a line of the terminal behind `stream`; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80  # some pseudo-terminals say 0
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns
