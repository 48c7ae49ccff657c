"""What objectives over generated text share: how it is generated, and how it is scored against gold answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import Conditions, UserError
from zoft.lm.logits.head import Positions
from zoft.lm.metrics.answers import scored
from zoft.lm.models.generate import Written, write
from zoft.lm.objectives._readout import Readout, of_losses
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn, torch

ONE_SAMPLE = "subspace=nodes moves what the layers of one text give: set it to 1, or use method=mezo"


@dataclass
class WrittenObjective(Objective):
    """An objective of what the model writes.

    A batch carries ``prompt_ids`` and ``prompts`` (lists), ``answers`` (what each is scored against) and ``answering``
    (:class:`zoft.lm.models.generate.Answering`). All points of a step sample with the same noise, so that their
    difference is that of the weights.

    Args:
        temperature: 0 writes the likeliest token; above, samples are drawn from softmax(logits / temperature).
        seed: of the samples; a prompt's noise comes from it and the prompt, and no global random state moves.
        num_samples: texts written for each prompt, whose scores are averaged.
        max_new_tokens: tokens a text may have; 0 takes the task's own number, 64 where it has none.
    """

    counts_with: ClassVar[Conditions] = {"seed": ("temperature", ())}

    temperature: float = 0.0
    seed: int = 0
    num_samples: int = 1
    max_new_tokens: int = 0

    def check(self) -> None:
        """Refuse a negative temperature, and several samples that would all be the same."""
        self.require(0 <= self.temperature < float("inf"), "temperature", "0 or more and finite")
        self.require(0 <= self.seed < 2**32, "seed", "0 or more and below 2**32")
        self.require(self.max_new_tokens >= 0, "max_new_tokens", "0 (the task's own) or more")
        self.require(self.num_samples >= 1, "num_samples", "at least 1")
        alike = self.num_samples > 1 and not self.temperature
        self.require(not alike, "num_samples", "1 with temperature=0", "the samples would all be the same")

    def of_writing(self) -> list[str]:
        """Names of the settings of how texts are written that differ from their defaults."""
        names, defaults = ("temperature", "seed", "num_samples", "max_new_tokens"), self.defaults()
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def differentiable(self) -> bool:
        """Text is chosen, not computed: it has no gradient."""
        return False

    @property
    def generates(self) -> bool:
        """Many forwards with a cache."""
        return True

    def num_terms(self, batch: Batch) -> int:
        """Prompts."""
        return len(batch["prompt_ids"])

    def texts(self, model: nn.Module, batch: Batch) -> list[list[str]]:
        """``num_samples`` lists of texts, one text a prompt."""
        return [one.texts for one in self.written(model, batch)]

    def written(self, model: nn.Module, batch: Batch) -> list[Written]:
        """``num_samples`` times what the model writes, a text a prompt."""
        answering = batch["answering"]
        if self.max_new_tokens:
            # the objective's own bound where it has one, else the task's
            answering = dataclasses.replace(answering, max_new_tokens=self.max_new_tokens)
        return [
            # each sample with another seed; the same seeds at every point of a step
            write(model, batch["prompt_ids"], answering, temperature=self.temperature, seed=self.seed + number)
            for number in range(self.num_samples)
        ]

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each prompt's, the mean over its samples, [B]."""
        return torch.stack(self.losses_of_samples(self.texts(model, batch), batch)).mean(0)

    def losses_of_samples(self, samples: list[list[str]], batch: Batch) -> list[Tensor]:
        """What each sample's texts add to the mean that is minimised, [B] each."""
        return [self.losses_of(texts, batch) for texts in samples]

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """What each text is worth, and nothing but that."""
        return ("loss",)

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """Where each prompt's first token is chosen; the others are chosen in calls of their own."""
        del model
        rows = torch.arange(len(batch["prompt_ids"]), device=batch["input_ids"].device)
        return Positions(rows, torch.full_like(rows, -1))

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """One term a prompt, seen in all calls that its text took."""
        del feedback
        if self.num_samples > 1:
            raise UserError(f"objective.num_samples={self.num_samples}: {ONE_SAMPLE}")
        (written,) = self.written(model, batch)
        losses = self.losses_of(written.texts, batch)
        # a text's term is read at the prompt's end, and in every call that wrote a token of it
        read = of_losses(losses, torch.arange(len(losses), device=losses.device))
        return dataclasses.replace(read, calls=torch.tensor(written.lengths, device=losses.device))

    def losses_of(self, texts: list[str], batch: Batch) -> Tensor:
        """What each text adds to the mean that is minimised, float32 [B]."""
        raise NotImplementedError


def is_written(batch: Batch) -> bool:
    """Whether answers to these rows are generated."""
    return "prompt_ids" in batch


def scores_of(texts: list[str], batch: Batch) -> Tensor:
    """F1 and exact match of each text, float32 [B, 2]."""
    answering = batch["answering"]
    pairs = zip(map(answering.answer_in, texts), batch["answers"], strict=True)
    scores = [scored(answer, gold, as_mezo=answering.as_mezo) for answer, gold in pairs]
    return torch.tensor([[one["f1"], one["exact_match"]] for one in scores])


def predictions_of_written(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """What is reported of greedy answers: F1 and exact match [B, 2], and zeros [B] in place of labels."""
    # greedy whatever the objective samples with: what is reported must not depend on luck
    texts = write(model, batch["prompt_ids"], batch["answering"]).texts
    scores = scores_of(texts, batch).to(batch["input_ids"].device)
    return scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
