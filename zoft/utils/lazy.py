"""`from zoft.utils.lazy import torch`: torch without its import time until it is first used.

A component's dataclass is also its Hydra schema, so `zoft train --help` and a mistyped key must be able to read
every component in milliseconds; importing torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _LazyModule:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next time it is found without coming here: hooks ask thousands of times
        return value


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")
