"""Writing a file so that it is either the old one or the whole new one, whatever interrupts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$ZOFT_CACHE, else $XDG_CACHE_HOME/zoft, else ~/.cache/zoft. It may not exist yet."""
    if own := os.environ.get("ZOFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zoft"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside ``path``, flush to the disk, rename over it.

    Args:
        path: the file; its folder must exist.
        content: text (UTF-8) or bytes.

    Raises:
        OSError: as the file system says; ``path`` is then what it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
