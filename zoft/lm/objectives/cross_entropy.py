"""The right answer's tokens, by cross-entropy over all of the batch's answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.logits.call import arguments
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.logits.support import is_known
from zoft.lm.objectives._counted import (
    is_counted,
    log_probs_of_counted,
    num_counted,
    predicted,
    predictions_of_counted,
    readout_of_tokens,
)
from zoft.lm.objectives._readout import Readout
from zoft.lm.objectives._written import is_written, predictions_of_written
from zoft.lm.objectives.base import Batch, Objective
from zoft.lm.objectives.options import Options, answers, ends, gold_of, group_sizes, option_log_probs
from zoft.utils.lazy import Tensor, nn, torch


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
        rows, places, targets = _right_tokens(batch)
        inputs = arguments(model, rows["input_ids"], rows["attention_mask"])
        return -log_probs_at(model, inputs, places, targets).mean()

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """The last hidden state, and each token's loss."""
        return ("hidden", "loss")

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """Where the tokens that count are predicted."""
        del model
        return predicted(batch)[0] if is_counted(batch) else _in_all_rows(batch, _right_tokens(batch)[1])

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """One position a token."""
        if is_counted(batch):
            places, targets = predicted(batch)
        else:
            _, places, targets = _right_tokens(batch)
            places = _in_all_rows(batch, places)
        inputs = arguments(model, batch["input_ids"], batch["attention_mask"])
        return readout_of_tokens(model, inputs, places, targets, feedback)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean negative log-probability of each example's own tokens, [B]."""
        of_tokens, example = self.readout(model, batch, "loss").losses, self.places(model, batch).row
        if not is_counted(batch):  # a right row for each example, among the rows of its options
            example = example.unique_consecutive(return_inverse=True)[1]
        counts = torch.bincount(example, minlength=len(batch["labels"]) if is_counted(batch) else 0)
        # mean over each example's own tokens: index_add sums them by example
        return of_tokens.new_zeros(len(counts)).index_add(0, example, of_tokens) / counts.clamp_min(1)

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


def _right_tokens(batch: Batch) -> tuple[Batch, Positions, Tensor]:
    """(the rows with right answers, the positions in them that predict an answer's tokens, those tokens)."""
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if "option_tokens" in batch:
        return rows, ends(batch), batch["option_tokens"].gather(1, gold_of(batch).unsqueeze(1)).squeeze(1)
    right = _gold_rows(batch)
    rows = {name: value[right] for name, value in rows.items()}
    return rows, *answers(rows["input_ids"], batch["option_len"][right])


def _in_all_rows(batch: Batch, places: Positions) -> Positions:
    """These positions with their rows counted in the whole batch."""
    if "option_tokens" in batch:
        return places
    return Positions(torch.tensor(_gold_rows(batch), device=places.row.device)[places.row], places.column)


def _gold_rows(batch: Batch) -> list[int]:
    """Which rows of the one-row-an-option layout hold a right answer."""
    # rows of an example stand together: first row + index of the right option
    rows, first = [], 0
    for size, index in zip(group_sizes(batch["num_options"]), gold_of(batch).tolist(), strict=True):
        rows.append(first + index)
        first += size
    return rows
