"""The metric itself, as it is reported: 1 minus accuracy, F1 or exact match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.lazy import torch
from zoft.objectives._written import Writing, is_written, scores_of
from zoft.objectives.base import Batch, Objective
from zoft.objectives.classes import Classes
from zoft.objectives.label_words import LabelWords
from zoft.objectives.options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn

METRICS = ("auto", "accuracy", "f1", "exact_match")
_GENERATED = ("f1", "exact_match")


@dataclass
class Metric(Writing):
    """1 - metric over the batch, without a gradient: accuracy of what is chosen, F1 or exact match of what is written.

    The settings of generation (all but ``metric``) say how answers are written; accuracy reads none of them.

    Args:
        metric: accuracy (tasks with options, label words or classes), f1 or exact_match (tasks with generated answers);
            auto takes the task's own.

    References: Malladi et al. 2023 (MeZO), section 3.3 (accuracy and F1 as objectives).
    """

    metric: str = "auto"

    def check(self) -> None:
        """Refuse an unknown metric."""
        super().check()
        self.require(self.metric in METRICS, "metric", f"one of {', '.join(METRICS)}")
        unread = self.metric == "accuracy" and (self.temperature or self.seed or self.max_new_tokens)
        self.require(not unread, "metric", "f1 or exact_match with settings of generation", "accuracy writes nothing")

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows that have right answers."""
        chosen, written = ("options", "mask", "head"), ("generate",)
        return {"auto": (*written, *chosen), "accuracy": chosen}.get(self.metric, written)

    @property
    def generates(self) -> bool:
        """Unless it can only be accuracy."""
        return self.metric != "accuracy"

    def num_terms(self, batch: Batch) -> int:
        """Examples."""
        return super().num_terms(batch) if is_written(batch) else chooser_of(batch).num_terms(batch)

    def try_out(self, model: nn.Module, batch: Batch) -> None:
        """As the objective that chooses."""
        if not is_written(batch):
            chooser_of(batch).try_out(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(1 - metric, scores of the choices, labels); of what is written F1 and exact match [B, 2], and zeros."""
        if not is_written(batch):
            _, scores, gold = chooser_of(batch).predict(model, batch)
            return 1 - (scores.argmax(1) == gold).float().mean(), scores, gold
        scores = torch.stack([scores_of(texts, batch) for texts in self.texts(model, batch)]).mean(0)
        scores = scores.to(batch["input_ids"].device)
        name = batch["answering"].metric if self.metric == "auto" else self.metric
        labels = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        return 1 - scores[:, _GENERATED.index(name)].mean(), scores, labels


def chooser_of(batch: Batch) -> Objective:
    """The objective that scores what there is to choose from in this batch."""
    if "word_ids" in batch:
        return LabelWords()
    return Options() if {"option_tokens", "option_len"} & batch.keys() else Classes()
