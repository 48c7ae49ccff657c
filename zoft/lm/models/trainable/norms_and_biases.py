"""Normalisation weights and biases, in all blocks or the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.models.trainable.base import Trainable, fresh_head, is_norm_or_bias
from zoft.lm.models.trainable.last_blocks import in_last_blocks
from zoft.utils.lazy import nn


@dataclass
class NormsAndBiases(Trainable):
    """Normalisation weights and biases, a few in ten thousand of the weights, and a fresh head.

    Args:
        num_blocks: only those of the last n blocks and after them; 0 takes the whole model.

    References: Ben Zaken et al. 2022 (BitFit) for biases.
    """

    num_blocks: int = 0

    def check(self) -> None:
        """Refuse a negative number of blocks."""
        self.require(self.num_blocks >= 0, "num_blocks", "0 (all) or more")

    def chosen(self, model: nn.Module) -> set[str]:
        """Names of norms and biases, and of a fresh head."""
        within = (
            in_last_blocks(model, self.num_blocks, self)
            if self.num_blocks
            else {n for n, _ in model.named_parameters()}
        )
        return {name for name in within if is_norm_or_bias(name)} | fresh_head(model)
