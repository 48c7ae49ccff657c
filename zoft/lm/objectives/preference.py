"""Direct preference optimisation: a pair's better answer made likelier than the other, against the frozen start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.lm.logits.call import arguments
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at
from zoft.lm.logits.support import is_known
from zoft.lm.objectives._counted import log_probs_of_counted, predicted
from zoft.lm.objectives._readout import Readout, of_hidden, of_losses
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn, torch


@dataclass
class Preference(Objective):
    """-log sigmoid(beta (log p(chosen)/p_0(chosen) - log p(rejected)/p_0(rejected))), averaged over pairs.

    p_0 is the model before training. Its log-probabilities are computed once for every row and kept with it
    (:func:`keep_reference`, which `zoft train` calls), so that no second model is held. What is reported as accuracy is
    the share of pairs whose better answer the model gives the larger log-probability, which needs no p_0.

    A batch is left-padded, two rows a pair, the better answer first (:class:`zoft.lm.data.encoding.PairCollator`).

    Args:
        beta: how fast leaving the start costs; 0.1 to 0.5 are common.

    References: Rafailov et al. 2023 (DPO), equation 7.
    """

    beta: float = 0.1

    def check(self) -> None:
        """Refuse what is no positive number."""
        self.require(0 < self.beta < float("inf"), "beta", "above 0 and finite")

    @property
    def forms(self) -> tuple[str, ...]:
        """Preference pairs."""
        return ("pairs",)

    def num_terms(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["input_ids"]) // 2

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Whether the head may be given rows."""
        if not is_known(model):
            self.predict(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, log-probabilities of both answers [B, 2], zeros [B]: the first one is right)."""
        # log p of each answer, both rows of a pair one behind the other
        log_probs = sums(model, batch)
        losses = self._losses(log_probs, batch)
        return losses.mean(), log_probs.view(-1, 2), torch.zeros(len(losses), dtype=torch.int64, device=losses.device)

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """The last hidden state; losses alone."""
        return ("hidden", "loss")

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """Where tokens of both answers are predicted."""
        del model
        return predicted(batch)[0]

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """Every token of both answers has its position; the loss of a pair is one term."""
        places, targets = predicted(batch)
        inputs = arguments(model, batch["input_ids"], batch["attention_mask"])

        def terms(log_probs: Tensor) -> Tensor:
            # log p of each answer from its tokens', then the pair's loss: differentiable in each token
            return self._losses(log_probs.new_zeros(len(batch["labels"])).index_add(0, places.row, log_probs), batch)

        if feedback == "hidden":
            return of_hidden(model, inputs, places, places.row // 2, terms=terms, targets=targets)
        return of_losses(terms(log_probs_at(model, inputs, places, targets)), places.row // 2)

    def _losses(self, sums: Tensor, batch: Batch) -> Tensor:
        """Each pair's loss [B] from the log-probabilities of all answers [2 B]."""
        if "reference" not in batch:
            raise UserError(
                "objective=preference needs each row's log-probabilities under the model before training: call "
                "zoft.lm.objectives.preference.keep_reference(model, rows, collator) before you train"
            )
        # log p / p_0 of both answers
        gains = (sums - batch["reference"]).view(-1, 2)
        # L = -log sigmoid(beta (gain of the chosen - gain of the rejected))
        return -torch.nn.functional.logsigmoid(self.beta * (gains[:, 0] - gains[:, 1]))


def sums(model: nn.Module, batch: Batch) -> Tensor:
    """log p of each row's answer: float32 [2 B], the sum over its tokens."""
    log_probs, row = log_probs_of_counted(model, batch)
    return log_probs.new_zeros(len(batch["labels"])).index_add(0, row, log_probs)


def keep_reference(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collator: Callable[[Sequence[dict[str, Any]]], Batch],
    batch_size: int = 16,
) -> Iterator[int]:
    """Put ``reference`` into every row: the log-probabilities of its two answers under the model as it is.

    Yields the number of rows done so far: exhaust it (``list(keep_reference(...))``).

    Args:
        model: before training, in evaluation mode.
        rows: pairs, changed in place.
        collator: makes batches of them.
        batch_size: pairs computed together; in the order of their lengths.
    """
    device = next(p.device for p in model.parameters() if not p.is_meta)  # a server may have the rest
    # long pairs first: the largest batch fails first, if any does
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]["input_ids"]))
    for start in range(0, len(order), batch_size):
        chosen = [rows[place] for place in order[start : start + batch_size]]
        batch = {key: value.to(device) for key, value in collator(chosen).items()}
        # p_0: no gradient, and no graph of the frozen start
        with torch.no_grad():
            log_probs = sums(model, batch).view(-1, 2).tolist()
        for row, values in zip(chosen, log_probs, strict=True):
            row["reference"] = values
        yield start + len(chosen)
