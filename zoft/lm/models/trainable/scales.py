"""The scales of a quantised base."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.models.trainable.base import Trainable
from zoft.utils.lazy import nn


@dataclass
class Scales(Trainable):
    """The quantiser's scales alone, by relative steps; the codes, and what is not quantised, stay as they are.

    One number for a row (``model.quantization=int8`` and ``int8_torchao``) or for 64 weights (``nf4``). What is saved
    is an ordinary quantised model, which transformers loads without zoft.

    References: Shang et al. 2025 (QZO, arXiv 2505.13430).
    """

    def chosen(self, model: nn.Module) -> set[str]:
        """The names of the scales' logarithms, which are made here."""
        from zoft.lm.models.scales import attach

        if hasattr(model, "peft_config"):
            raise UserError(
                "trainable=scales trains the quantised base and saves it, and an adapter lies on top of it: use "
                "peft=none, or trainable=adapter"
            )
        return set(attach(model))
