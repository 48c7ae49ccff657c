"""Every weight of the model (with an adapter: see ``adapter``)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.models.trainable.base import Trainable
from zoft.utils.lazy import nn


@dataclass
class All(Trainable):
    """Every floating-point weight; tied weights count and move once."""

    def chosen(self, model: nn.Module) -> set[str]:
        """All names."""
        return {name for name, _ in model.named_parameters()}
