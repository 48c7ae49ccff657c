"""zoft: zeroth-order (forward-only) fine-tuning of language models.

    from zoft import ZOTrainer, ZOConfig

Names are loaded when they are first used, so that importing zoft costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ZOTrainer": "zoft.trainer",
    "ZOMixin": "zoft.trainer",
    "ZOConfig": "zoft.arguments",
    "Minimizer": "zoft.blackbox.minimizer",
    "minimize": "zoft.blackbox.minimize",
    "tune": "zoft.blackbox.tune.tune",
    "UserError": "zoft.errors",
    "components": "zoft.component",
    "create": "zoft.component",
}

__all__ = [
    "Minimizer",
    "UserError",
    "ZOConfig",
    "ZOMixin",
    "ZOTrainer",
    "__version__",
    "components",
    "create",
    "minimize",
    "tune",
]

if TYPE_CHECKING:
    from zoft.arguments import ZOConfig
    from zoft.blackbox.minimize import minimize
    from zoft.blackbox.minimizer import Minimizer
    from zoft.blackbox.tune.tune import tune
    from zoft.component import components, create
    from zoft.errors import UserError
    from zoft.trainer import ZOMixin, ZOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
