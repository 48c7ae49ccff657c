"""Every weight of the model (with an adapter: see ``adapter``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lm.models.trainable.base import Trainable

if TYPE_CHECKING:
    from torch import nn


@dataclass
class All(Trainable):
    """Every floating-point weight; tied weights count and move once."""

    def chosen(self, model: nn.Module) -> set[str]:
        """All names."""
        return {name for name, _ in model.named_parameters()}
