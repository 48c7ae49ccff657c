"""The gold answer's tokens, by cross-entropy over all of the batch's answer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lazy import torch
from zoft.objectives.base import Batch, Objective
from zoft.objectives.options import Options, gold_of, group_sizes, last_logits

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class CrossEntropy(Objective):
    """Cross-entropy of the gold option's tokens, averaged over the batch's tokens; options still rank for the metric.

    References: Malladi et al. 2023 (MeZO): the language-modelling loss of tasks that are not trained as classification.
    """

    def num_terms(self, batch: Batch) -> int:
        """Tokens of the gold options."""
        if "option_tokens" in batch:
            return len(gold_of(batch))
        return int(batch["option_len"][_gold_rows(batch)].sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-probability of the gold tokens."""
        gold = gold_of(batch)
        if "option_tokens" in batch:
            logits = last_logits(model, batch["input_ids"], batch["attention_mask"], 1)[:, -1].float()
            target = batch["option_tokens"].gather(1, gold.unsqueeze(1)).squeeze(1)
            return torch.nn.functional.cross_entropy(logits, target)
        return self._loss_of_rows(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, option scores [B, O], gold index [B])."""
        _, scores, gold = Options().predict(model, batch)
        return self.loss(model, batch), scores, gold

    def _loss_of_rows(self, model: nn.Module, batch: Batch) -> Tensor:
        rows = _gold_rows(batch)
        ids, mask, lengths = batch["input_ids"][rows], batch["attention_mask"][rows], batch["option_len"][rows]
        longest = int(lengths.max())
        logits = last_logits(model, ids, mask, longest + 1)[:, :-1].float()
        inside = torch.arange(longest, device=ids.device) >= longest - lengths.unsqueeze(1)
        labels = ids[:, -longest:].masked_fill(~inside, -100)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _gold_rows(batch: Batch) -> list[int]:
    """Which rows of the one-row-an-option layout hold a right answer."""
    rows, first = [], 0
    for size, index in zip(group_sizes(batch["num_options"]), gold_of(batch).tolist(), strict=True):
        rows.append(first + index)
        first += size
    return rows
