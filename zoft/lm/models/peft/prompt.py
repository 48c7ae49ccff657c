"""Prompt tuning through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.lm.models.peft.base import Peft


@dataclass
class Prompt(Peft):
    """Trained embeddings in front of the input.

    Args:
        num_virtual_tokens: how many.

    References: Lester et al. 2021.
    """

    num_virtual_tokens: int = 10

    def check(self) -> None:
        """Refuse an empty prompt."""
        self.require(self.num_virtual_tokens >= 1, "num_virtual_tokens", "at least 1")

    def config(self, task_type: str) -> Any | None:
        """A ``peft.PromptTuningConfig``."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(task_type=task_type, num_virtual_tokens=self.num_virtual_tokens)
