"""The right answer's tokens, by cross-entropy over all of the batch's answer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lm.logits.call import arguments
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.logits.support import is_known
from zoft.lm.objectives._counted import is_counted, log_probs_of_counted, num_counted, predictions_of_counted
from zoft.lm.objectives._written import is_written, predictions_of_written
from zoft.lm.objectives.base import Batch, Objective
from zoft.lm.objectives.options import Options, answers, ends, gold_of, group_sizes, option_log_probs
from zoft.utils.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class CrossEntropy(Objective):
    """Cross-entropy of the gold option's tokens, averaged over the batch's tokens; options still rank for the metric.

    Completions and chats come with a label for every token ([B, T]; below 0 where the loss does not look) and have no
    options: their tokens that count are averaged over the batch.

    Only the positions that predict those tokens go through the language-model head, a bounded number of them at a time.

    References: Malladi et al. 2023 (MeZO): the language-modelling loss of tasks that are not trained as classification.
    """

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows with a right text."""
        return ("options", "generate", "counted")

    def num_terms(self, batch: Batch) -> int:
        """Tokens of the gold options, or those that count."""
        if is_counted(batch):
            return num_counted(batch)
        if "option_tokens" in batch:
            return len(gold_of(batch))
        return int(batch["option_len"][_gold_rows(batch)].sum())

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Whether the head may be given rows."""
        if not is_known(model):
            self.loss(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-probability of the gold tokens."""
        if is_counted(batch):
            return -log_probs_of_counted(model, batch)[0].mean()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if "option_tokens" in batch:
            places, targets = ends(batch), batch["option_tokens"].gather(1, gold_of(batch).unsqueeze(1)).squeeze(1)
        else:
            rows = _gold_rows(batch)
            ids, mask = ids[rows], mask[rows]
            places, targets = answers(ids, batch["option_len"][rows])
        return -log_probs_at(model, arguments(model, ids, mask), places, targets).mean()

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, option scores [B, O], gold index [B]), all from one forward.

        Without options: (loss, each row's sum of losses [B], its number of tokens that count [B]). Where answers are
        generated: (loss of the gold ones, F1 and exact match of the model's own [B, 2], zeros [B]).
        """
        if is_written(batch):
            return self.loss(model, batch), *predictions_of_written(model, batch)
        if is_counted(batch):
            return predictions_of_counted(model, batch)
        log_probs = option_log_probs(model, batch)
        _, scores, gold = Options().ranked(batch, log_probs)
        if "option_tokens" in batch:
            tokens = log_probs.gather(1, gold.unsqueeze(1))
        else:
            of_rows = log_probs.split(batch["option_len"].tolist())
            tokens = torch.cat([of_rows[row] for row in _gold_rows(batch)])
        return -tokens.mean(), scores, gold


def _gold_rows(batch: Batch) -> list[int]:
    """Which rows of the one-row-an-option layout hold a right answer."""
    rows, first = [], 0
    for size, index in zip(group_sizes(batch["num_options"]), gold_of(batch).tolist(), strict=True):
        rows.append(first + index)
        first += size
    return rows
