"""The adapter where there is one, else every weight; the last block where layers' outputs move."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.models.trainable.base import Trainable
from zoft.utils.lazy import nn


@dataclass
class Auto(Trainable):
    """What ``requires_grad`` says already: everything for a plain model, the adapter for a PEFT one.

    A run with ``subspace=nodes`` on a plain model trains the last block (``last_blocks`` with one block) instead.
    """

    def chosen(self, model: nn.Module) -> set[str]:
        """The names that require a gradient now."""
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
