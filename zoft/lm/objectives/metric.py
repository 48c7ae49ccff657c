"""The metric itself: 1 minus accuracy, F1 or exact match as they are reported, or any metric of `evaluate`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.lm.logits.head import Positions
from zoft.lm.metrics import libraries
from zoft.lm.objectives._written import WrittenObjective, is_written, scores_of
from zoft.lm.objectives.base import Batch, Objective
from zoft.lm.objectives.classes import Classes
from zoft.lm.objectives.label_words import LabelWords
from zoft.lm.objectives.options import Options
from zoft.utils.lazy import Tensor, nn, torch

METRICS = ("auto", "accuracy", "f1", "exact_match")
LIBRARY = "evaluate:"
"""What a metric of the `evaluate` library begins with."""

_GENERATED = ("f1", "exact_match")


@dataclass
class Metric(WrittenObjective):
    """1 - metric over the batch, without a gradient: accuracy of what is chosen, F1 or exact match of what is written.

    The settings of generation say how answers are written; accuracy reads none of them. A metric of `evaluate` is
    computed over the batch, of class indices or of texts against their gold answers, and is code to run: it is taken
    from the command line or from Python, never from a file. What is reported stays accuracy, or F1 and exact match.

    Args:
        metric: accuracy (tasks with options, label words or classes), f1 or exact_match (tasks with generated answers);
            auto takes the task's own; ``evaluate:NAME`` the first number of a metric of the `evaluate` library,
            ``evaluate:NAME#key`` another one. NAME may be the folder of a metric's script.
        greater_is_better: of an `evaluate` metric: whether 1 - metric is minimised, and not the metric itself.

    References: Malladi et al. 2023 (MeZO), section 3.3 (accuracy and F1 as objectives).
    """

    metric: str = "auto"
    greater_is_better: bool = True

    def check(self) -> None:
        """Refuse an unknown metric, and settings that it does not read."""
        super().check()
        known = self.metric in METRICS or bool(libraries.split(self.library)[0])
        self.require(known, "metric", f"one of {', '.join(METRICS)}, or {LIBRARY}NAME")
        why = "it is about metrics of the evaluate library"
        self.require(self.greater_is_better or bool(self.library), "greater_is_better", f"true with {self.metric}", why)
        unread = self.metric == "accuracy" and self.of_writing()
        self.require(not unread, "metric", "f1 or exact_match with settings of generation", "accuracy writes nothing")

    @property
    def library(self) -> str:
        """The `evaluate` metric, with its key; empty for the house's own."""
        return self.metric.removeprefix(LIBRARY) if self.metric.startswith(LIBRARY) else ""

    def without_library(self) -> Metric:
        """What evaluates where the `evaluate` metric is computed over all rows at the end."""
        return dataclasses.replace(self, metric="auto", greater_is_better=True)

    def prepare(self) -> None:
        """A metric of `evaluate` has to be there."""
        if self.library:
            libraries.loaded(libraries.split(self.library)[0])

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows that have right answers."""
        chosen, written = ("options", "mask", "head"), ("generate",)
        return {"accuracy": chosen, "f1": written, "exact_match": written}.get(self.metric, (*written, *chosen))

    @property
    def generates(self) -> bool:
        """Unless it can only be accuracy."""
        return self.metric != "accuracy"

    def num_terms(self, batch: Batch) -> int:
        """Examples."""
        return super().num_terms(batch) if is_written(batch) else chooser_of(batch).num_terms(batch)

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """As the objective that chooses."""
        if not is_written(batch):
            chooser_of(batch).probe(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(1 - metric, scores of the choices, labels); of what is written F1 and exact match [B, 2], and zeros."""
        if not is_written(batch):
            # 0 or 1 an example: the mean moves in steps of 1 / B
            _, scores, gold = chooser_of(batch).predict(model, batch)
            if self.library:
                return self._of_library([scores.argmax(1).tolist()], gold.tolist()).to(scores.device), scores, gold
            return 1 - (scores.argmax(1) == gold).float().mean(), scores, gold
        # samples of one prompt are averaged before the metric's mean
        samples = self.texts(model, batch)
        scores = torch.stack([scores_of(texts, batch) for texts in samples]).mean(0).to(batch["input_ids"].device)
        labels = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        if self.library:
            read = batch["answering"].answer_in
            predictions = [[read(text) for text in texts] for texts in samples]
            return self._of_library(predictions, batch["answers"]).to(scores.device), scores, labels
        # auto: the task's own metric
        name = batch["answering"].metric if self.metric == "auto" else self.metric
        return 1 - scores[:, _GENERATED.index(name)].mean(), scores, labels

    @property
    def tells_examples(self) -> bool:
        """A metric of `evaluate` is one number for all."""
        return not self.library

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """1 - each example's metric, [B]; of what is chosen 0 or 1."""
        if is_written(batch):
            return super().losses(model, batch)
        _, scores, gold = chooser_of(batch).predict(model, batch)
        # 1 where the best score is not the gold one
        return 1 - (scores.argmax(1) == gold).float()

    def losses_of(self, texts: list[str], batch: Batch) -> Tensor:
        """1 - each text's F1 or exact match, [B]."""
        if self.library:
            raise UserError(
                f"objective.metric={self.metric} is one number for all texts, and subspace=nodes needs one for each: "
                "set objective.metric=f1 or exact_match, or use method=mezo"
            )
        name = batch["answering"].metric if self.metric == "auto" else self.metric
        return 1 - scores_of(texts, batch)[:, _GENERATED.index(name)].to(batch["input_ids"].device)

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """As for whatever is written."""
        if not is_written(batch):
            raise UserError(
                "objective=metric of what is chosen moves in jumps, and says little of each example: subspace=nodes "
                "takes objective=options (classes, label_words), or use method=mezo"
            )
        return super().places(model, batch)

    def _of_library(self, samples: list[list[Any]], references: list[Any]) -> Tensor:
        """What is minimised of the `evaluate` metric, its mean over samples; float32."""
        values = [libraries.value_of(self.library, predictions, references) for predictions in samples]
        mean = torch.tensor(values).mean()
        # minimised either way: 1 - metric, or the metric itself where less is better
        return 1 - mean if self.greater_is_better else mean


def chooser_of(batch: Batch) -> Objective:
    """The objective that scores this batch: its options, or a head's classes."""
    if "word_ids" in batch:
        return LabelWords()
    return Options() if {"option_tokens", "option_len"} & batch.keys() else Classes()
