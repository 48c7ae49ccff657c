"""Classification by the word that a masked language model puts at the mask."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import logits_at
from zoft.lm.logits.support import is_known
from zoft.lm.objectives._readout import Readout, of_log_odds, of_losses, of_scores
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn, torch


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
        # the words of the batch's examples, each looked up once
        words, index = batch["word_ids"].unique(return_inverse=True)
        scores = self._logits(model, batch, words).gather(1, index)
        return torch.nn.functional.cross_entropy(scores, batch["labels"]), scores, batch["labels"]

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """Scores of words; losses alone."""
        return ("scores", "log_odds", "loss")

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """The masks."""
        del model
        rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        # columns count from the right end, as everywhere
        return Positions(rows, batch["mask_position"] - batch["input_ids"].shape[1])

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """One position an example."""
        words, index = batch["word_ids"].unique(return_inverse=True)
        gold = batch["labels"]
        readout = of_scores(self._logits(model, batch, words), gold, words, index)
        if feedback == "log_odds":
            # which word is right names the response: words differ in how their odds move
            return of_log_odds(readout.losses, batch["word_ids"].gather(1, gold.unsqueeze(1)).squeeze(1))
        return readout if feedback == "scores" else of_losses(readout.losses, readout.unit)

    def _logits(self, model: nn.Module, batch: Batch, words: Tensor) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return logits_at(model, inputs, self.places(model, batch), words)
