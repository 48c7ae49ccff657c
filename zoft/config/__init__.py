"""Configs: what a run is made of, composed from YAML and the command line; the only importer of hydra and omegaconf.

Names are loaded when first used: listing choices for `--help` must not pay for Hydra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BudgetConfig": "zoft.config.schema",
    "DiagnosticsConfig": "zoft.config.schema",
    "ModelConfig": "zoft.config.schema",
    "TrackerConfig": "zoft.config.schema",
    "ZoftConfig": "zoft.config.schema",
    "compose": "zoft.config.loader",
    "multirun": "zoft.config.sweep",
    "resolved_yaml": "zoft.config.resolved",
}

__all__ = [
    "BudgetConfig",
    "DiagnosticsConfig",
    "ModelConfig",
    "TrackerConfig",
    "ZoftConfig",
    "compose",
    "multirun",
    "resolved_yaml",
]

if TYPE_CHECKING:
    from zoft.config.loader import compose
    from zoft.config.resolved import resolved_yaml
    from zoft.config.schema import BudgetConfig, DiagnosticsConfig, ModelConfig, TrackerConfig, ZoftConfig
    from zoft.config.sweep import multirun


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoft.config' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
