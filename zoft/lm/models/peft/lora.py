"""LoRA through peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.lm.models.peft.base import Peft


@dataclass
class Lora(Peft):
    """Low-rank adapters: W + (lora_alpha / r) B A. B starts at zero, so the model starts as it is.

    Args:
        r: rank, at least 1.
        lora_alpha: scale of the adapter is lora_alpha / r.
        target_modules: module names that get one; empty takes peft's choice for the architecture (q and v for most).
        layers_to_transform: indices of the blocks that get one; empty takes all.

    References: Hu et al. 2022, section 4.1; defaults r 8, alpha 16 on q and v as in MeZO (Malladi et al. 2023).
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: list[str] | None = None
    layers_to_transform: list[int] | None = None

    def check(self) -> None:
        """Refuse a rank or a scale below 1."""
        self.require(self.r >= 1, "r", "at least 1")
        self.require(self.lora_alpha >= 1, "lora_alpha", "at least 1")

    def config(self, task_type: str) -> Any | None:
        """A ``peft.LoraConfig`` without dropout: dropout would make the two losses of a pair differ."""
        from peft import LoraConfig

        return LoraConfig(
            task_type=task_type,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            target_modules=list(self.target_modules) if self.target_modules else None,
            layers_to_transform=list(self.layers_to_transform) if self.layers_to_transform else None,
        )
