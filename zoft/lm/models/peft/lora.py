"""LoRA through peft."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from zoft.errors import UserError
from zoft.lm.models.peft.base import Peft
from zoft.utils.lazy import nn, torch
from zoft.weights.tensors import ATTENTION, ROUTER

ON = ("auto", "peft", "feed_forward")


@dataclass
class Lora(Peft):
    """Low-rank adapters: W + (lora_alpha / r) B A. B starts at zero, so the model starts as it is.

    Args:
        r: rank, at least 1.
        lora_alpha: scale of the adapter is lora_alpha / r.
        target_modules: module names that get one; empty leaves it to ``on``.
        layers_to_transform: indices of the blocks that get one; empty takes all.
        on: peft (its choice for the architecture, q and v for most), feed_forward (the matrices of blocks outside of
            attention), or auto: feed_forward where a run has node directions, which need no probes there in most
            models, else peft.

    References: Hu et al. 2022, section 4.1; defaults r 8, alpha 16 on q and v as in MeZO (Malladi et al. 2023).
    """

    r: int = 8
    lora_alpha: int = 16
    target_modules: list[str] | None = None
    layers_to_transform: list[int] | None = None
    on: str = "auto"

    def check(self) -> None:
        """Refuse a rank or a scale below 1, an unknown word, and two answers to which layers get an adapter."""
        self.require(self.on in ON, "on", f"one of {', '.join(ON)}")
        self.require(self.on != "feed_forward" or not self.target_modules, "on", "auto with target_modules, or alone")
        self.require(self.r >= 1, "r", "at least 1")
        self.require(self.lora_alpha >= 1, "lora_alpha", "at least 1")

    @property
    def is_free(self) -> bool:
        """Whether no setting says which layers get an adapter."""
        return self.on == "auto" and not self.target_modules

    def wrap(self, model: nn.Module, seed: int, revision: str | None = None) -> nn.Module:
        """As every adapter's."""
        if self.on != "feed_forward":
            return super().wrap(model, seed, revision)
        named = replace(self, on="peft")
        named.target_modules = feed_forward_of(model)  # type: ignore[assignment]  # peft takes a pattern too
        return named.wrap(model, seed, revision)

    def config(self, task_type: str) -> Any | None:
        """A ``peft.LoraConfig`` without dropout: dropout would make the two losses of a pair differ."""
        from peft import LoraConfig

        targets: Any = self.target_modules
        return LoraConfig(
            task_type=task_type,
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,
            target_modules=targets if isinstance(targets, str) else list(targets or ()) or None,
            layers_to_transform=list(self.layers_to_transform) if self.layers_to_transform else None,
        )


def feed_forward_of(model: nn.Module) -> str:
    """A regular expression for the names of a model's matrices in numbered blocks outside of attention.

    Raises:
        UserError: there are none.

    Example:
        >>> block = torch.nn.ModuleDict({"self_attn": torch.nn.Linear(2, 2), "fc1": torch.nn.Linear(2, 2)})
        >>> bool(re.fullmatch(feed_forward_of(torch.nn.Sequential(block)), "layers.0.fc1"))
        True
    """
    inside = set()
    for name, module in model.named_modules():
        words = name.split(".")
        number = max((i for i, word in enumerate(words) if word.isdecimal()), default=None)
        is_matrix = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
        behind = "" if number is None else ".".join(words[number + 1 :])  # mlp.up_proj, fc1: behind the block's number
        if behind and is_matrix and not (ATTENTION.search(behind) or ROUTER.search(f"{behind}.")):
            inside.add(re.escape(behind))
    if not inside:
        raise UserError(
            f"peft.on=feed_forward finds no matrix in the blocks of {type(model).__name__} outside of attention: name "
            "modules (peft.target_modules=[...]), or use peft.on=peft"
        )
    return rf"(?:.*\.)?\d+\.(?:{'|'.join(sorted(inside))})"
