"""What every choice of trainable weights promises: a predicate over parameter names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zoft.component import Component
from zoft.errors import UserError
from zoft.lm.models.quantized import num_weights
from zoft.utils.lazy import nn

_NORM_OR_BIAS = re.compile(r"(norm|(^|\.)ln_?\w*)(\.\w+)?\.(weight|bias)$|(^|\.)bias$|\.bias$", re.IGNORECASE)

OF_THE_BASE = (
    "trainable={} trains weights of the base model{}, and only the adapter is saved: use trainable=adapter, or "
    "peft=none"
)
NO_ADAPTER = "trainable=adapter needs an adapter: choose peft=lora, peft=prefix or peft=prompt, or another trainable"


@dataclass
class Trainable(Component):
    """Which weights move; everything else is frozen."""

    def chosen(self, model: nn.Module) -> set[str]:
        """Names (as in ``named_parameters()``) of the weights to train."""
        raise NotImplementedError

    def apply(self, model: nn.Module) -> tuple[int, int]:
        """Set ``requires_grad`` on every parameter of ``model``.

        Returns:
            (number of trained weights, number of weights), each counted once when tied.

        Raises:
            UserError: nothing is left to train; some names of the model are listed.
        """
        chosen = self.chosen(model)
        saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if hasattr(model, "peft_config") and not chosen <= saved:
            raise UserError(OF_THE_BASE.format(self.name(), f" (such as {min(chosen - saved)})"))
        trained = total = 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen and parameter.is_floating_point())
            total += num_weights(parameter)
            trained += parameter.numel() if parameter.requires_grad else 0
        if not trained:
            names = [name for name, _ in model.named_parameters()]
            shown = ", ".join(names[:: max(1, len(names) // 4)][:4])
            raise UserError(
                f"trainable={self.name()} selects no weights of this model (its parameters have names such as {shown})"
            )
        return trained, total


def is_norm_or_bias(name: str) -> bool:
    """Whether a parameter is a normalisation weight or a bias, by its name in any family transformers has.

    Example:
        >>> is_norm_or_bias("model.layers.3.input_layernorm.weight"), is_norm_or_bias("transformer.h.0.ln_1.weight")
        (True, True)
        >>> is_norm_or_bias("lm_head.weight")
        False
    """
    return _NORM_OR_BIAS.search(name) is not None


def fresh_head(model: nn.Module) -> set[str]:
    """Names of a classifier's head: what a sequence classification model has beside its base model.

    A head that was just made knows nothing, so whatever else is chosen, it is trained; empty for other models.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not type(model).__name__.endswith("ForSequenceClassification") or not prefix:
        return set()
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")}


def block_of(name: str) -> int | None:
    """The index of the repeated block that a parameter belongs to, or None outside the blocks.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj.weight"), block_of("model.norm.weight")
        (12, None)
    """
    match = re.search(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)\.", name)
    return int(match.group(1)) if match else None
