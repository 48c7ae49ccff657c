"""Where zoft keeps what can be made or fetched again: assets and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$ZOFT_CACHE, else $XDG_CACHE_HOME/zoft, else ~/.cache/zoft. It may not exist yet."""
    if own := os.environ.get("ZOFT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zoft"
