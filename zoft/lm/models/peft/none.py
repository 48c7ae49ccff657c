"""No adapter: the model's own weights are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.lm.models.peft.base import Peft


@dataclass
class NoAdapter(Peft):
    """The model's own weights are trained."""

    def config(self, task_type: str) -> Any | None:
        """None: no peft configuration."""
        del task_type
        return None
