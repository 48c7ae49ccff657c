"""Writing a file so that it is either the old one or the whole new one, whatever interrupts."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
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
