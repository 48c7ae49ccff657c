"""The adapter's weights only."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.models.trainable.base import NO_ADAPTER, Trainable
from zoft.utils.lazy import nn


@dataclass
class Adapter(Trainable):
    """The weights that PEFT trains; refuses a model without an adapter instead of training all of it."""

    def chosen(self, model: nn.Module) -> set[str]:
        """The names that PEFT left trainable."""
        if not hasattr(model, "peft_config"):
            raise UserError(NO_ADAPTER)
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
