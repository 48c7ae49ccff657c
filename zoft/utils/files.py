"""Writing a file so that it is either the old one or the whole new one, whatever interrupts."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

_UNFINISHED = re.compile(r"\.(.+)\.\d+\.new")  # the name that a file has until it is whole


def at_home(path: str) -> Path:
    """A path as users write it, ``~`` for the home; a folder that is called ``~x`` is itself without a user x."""
    return Path(os.path.expanduser(path))


def cache_dir() -> Path:
    """$ZOFT_CACHE, else $XDG_CACHE_HOME/zoft, else ~/.cache/zoft. It may not exist yet."""
    if folder := os.environ.get("ZOFT_CACHE"):
        return at_home(folder)
    return at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zoft"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside ``path``, flush to the disk, rename over it.

    Args:
        path: the file; its folder must exist.
        content: text (UTF-8) or bytes.

    Raises:
        OSError: as the file system says; ``path`` is then what it was.
    """
    # in the same folder, since a rename does not cross file systems
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        beside.unlink(missing_ok=True)  # of an earlier process of this number, or a link put there by another user
        with beside.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            # on the disk before the rename, or a crash could leave an empty file under the final name
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        error.filename = str(path)  # the name that the user gave
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_filled(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """As :func:`write_atomically`, with the contents that ``fill`` writes into the file it is given.

    Args:
        path: the file; its folder must exist.
        fill: a picture's ``save``, for one.
    """
    buffer = io.BytesIO()
    fill(buffer)
    write_atomically(path, buffer.getvalue())


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what a write that was killed has left.

    Example:
        >>> is_unfinished(".config.yaml.4242.new"), is_unfinished("config.yaml")
        (True, False)
    """
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder itself; nobody else may be writing there."""
    for path in folder.iterdir():
        if is_unfinished(path.name):
            path.unlink(missing_ok=True)
