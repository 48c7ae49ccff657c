"""`from zoft.utils.lazy import Tensor, nn, torch`: torch without its import time until it is first used.

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


class _LazyTensor(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.Tensor)


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch import nn as nn
else:
    torch, nn = _LazyModule("torch"), _LazyModule("torch.nn")

    class Tensor(metaclass=_LazyTensor):
        """For annotations and ``isinstance``; anything else wants ``torch.Tensor``."""
