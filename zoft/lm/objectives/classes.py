"""Classification by a head with an output for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lm.logits.call import called
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Classes(Objective):
    """Cross-entropy over the classes of a sequence classifier, such as the fresh head of ``task.prompt=head``.

    A batch is right-padded: ``input_ids`` [B, T] and ``labels`` [B].
    """

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows for a classification head."""
        return ("head",)

    def num_terms(self, batch: Batch) -> int:
        """Examples."""
        return len(batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits of the classes [B, C], gold class [B])."""
        scores = called(model, {name: batch[name] for name in ("input_ids", "attention_mask")}).float()
        return torch.nn.functional.cross_entropy(scores, batch["labels"]), scores, batch["labels"]
