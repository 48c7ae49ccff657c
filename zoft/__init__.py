"""zoft: zeroth-order (forward-only) fine-tuning of language models.

    from zoft import ZOTrainer, ZOConfig

Names are loaded when they are first used, so that importing zoft costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zoft.version import __version__

_HOMES = {
    "ZOTrainer": "zoft.trainer.trainer",
    "ZOMixin": "zoft.trainer.trainer",
    "ZOConfig": "zoft.trainer.config",
    "zo_config": "zoft.trainer.config",
    "Minimizer": "zoft.blackbox.minimizer",
    "minimize": "zoft.blackbox.minimize",
    "tune": "zoft.tuning.tune",
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
    "zo_config",
]

if TYPE_CHECKING:
    from zoft.blackbox.minimize import minimize
    from zoft.blackbox.minimizer import Minimizer
    from zoft.component import components, create
    from zoft.errors import UserError
    from zoft.trainer.config import ZOConfig, zo_config
    from zoft.trainer.trainer import ZOMixin, ZOTrainer
    from zoft.tuning.tune import tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
