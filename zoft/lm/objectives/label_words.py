"""Classification by the word that a masked language model puts at the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import logits_at
from zoft.lm.logits.support import is_known
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class LabelWords(Objective):
    """Cross-entropy over the label words' logits at the mask; the largest of them is the prediction.

    A batch is right-padded (:class:`zoft.lm.data.masked.RightPaddedCollator`): ``input_ids`` [B, T],
    ``mask_position`` [B], ``word_ids`` [B, C] (the token of each word) and ``labels`` [B]. Only the masks go through
    the language-model head, and of a linear one only the words' rows are read.

    References: Gao et al. 2021 (LM-BFF), equation 1, as used by Malladi et al. 2023 (MeZO) for RoBERTa.
    """

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows with a mask."""
        return ("mask",)

    def num_terms(self, batch: Batch) -> int:
        """Examples."""
        return len(batch["labels"])

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Whether the head may be given rows."""
        if not is_known(model):
            self.predict(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits of the words [B, C], gold index [B])."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        masks = Positions(rows, batch["mask_position"] - batch["input_ids"].shape[1])
        words, index = batch["word_ids"].unique(return_inverse=True)
        scores = logits_at(model, inputs, masks, words).gather(1, index)
        return torch.nn.functional.cross_entropy(scores, batch["labels"]), scores, batch["labels"]
