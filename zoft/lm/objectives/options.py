"""Classification over answer options by their mean log-likelihood (MeZO's `train_as_classification`)."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.logits import packing as packing
from zoft.lm.logits import support as heads
from zoft.lm.logits.call import arguments
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_at, log_probs_of, logits_at
from zoft.lm.objectives._readout import Readout, of_hidden, of_log_odds, of_losses, of_scores, of_sequences
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn, torch


@dataclass
class Options(Objective):
    """Cross-entropy over each example's options, scored by the mean log-probability of the option's tokens.

    A batch comes in one of two layouts, both left-padded (:mod:`zoft.lm.data.tokens` chooses):

    * one row a prompt, when every option is one token: ``input_ids`` [B, T], ``option_tokens`` [B, O], ``labels`` [B];
    * one row an option: ``input_ids`` [R, T] with R = sum of ``num_options``, ``option_len`` [R], ``num_options`` [R]
      and ``labels`` [R] (the gold index, the same on every row of an example). Beside it there may be ``packed``, the
      same tokens with the options of an example behind one context (:mod:`zoft.lm.data.packing`), and ``also_right``
      [R], whether the option is right, where an example has several that are: the loss goes for ``labels``, a metric
      counts all of them.

    Only the positions that predict an option's tokens go through the language-model head. The loss over options of one
    token reads those tokens' rows of it alone: the normaliser over the vocabulary is the same for all of them and
    cancels. Scores are always log-probabilities over the whole vocabulary, so that they mean the same in both layouts
    and can be set against those of another prompt (calibration).

    References: Malladi et al. 2023 (MeZO), the published `forward_wrap_with_option_len`.
    """

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows with options."""
        return ("options",)

    def num_terms(self, batch: Batch) -> int:
        """Prompts, not rows."""
        return len(gold_of(batch))

    def probe(self, model: nn.Module, batch: Batch) -> None:
        """Whether the head may be given rows, and options packed."""
        if not heads.is_known(model) or ("packed" in batch and not packing.is_known(model, batch["packed"])):
            self.predict(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the gold option among the options, averaged over the prompts."""
        if "option_tokens" not in batch:
            return self.predict(model, batch)[0]
        # the union of the batch's options: one product for all examples, then each takes its own
        candidates, index = batch["option_tokens"].unique(return_inverse=True)
        logits = logits_at(model, _inputs(model, batch), ends(batch), candidates)  # [B, C]
        return torch.nn.functional.cross_entropy(logits.gather(1, index), gold_of(batch))

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, scores [B, O], gold index [B]); options that an example lacks score -inf."""
        return self.ranked(batch, option_log_probs(model, batch))

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """Scores of options; losses alone; the last hidden state."""
        return ("scores", "hidden", "log_odds", "loss")

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """Where option tokens are predicted."""
        del model
        return ends(batch) if "option_tokens" in batch else answers(batch["input_ids"], batch["option_len"])[0]

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """From options of one token, or of several."""
        read = _of_tokens if "option_tokens" in batch else _of_sequences
        return read(model, batch, feedback)

    def ranked(self, batch: Batch, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`predict` returns, from what :func:`option_log_probs` does."""
        scores, gold = log_probs, gold_of(batch)
        if "option_tokens" not in batch:
            means = _means(log_probs, batch["option_len"])  # [R]
            examples = means.split(group_sizes(batch["num_options"]))
            # examples have different numbers of options: the missing ones score -inf
            scores = torch.nn.utils.rnn.pad_sequence(list(examples), batch_first=True, padding_value=-torch.inf)
        return torch.nn.functional.cross_entropy(scores, gold), scores, _counted(batch, scores, gold)


def _of_tokens(model: nn.Module, batch: Batch, feedback: str) -> Readout:
    """One position an example."""
    candidates, index = batch["option_tokens"].unique(return_inverse=True)
    gold, inputs, places = gold_of(batch), _inputs(model, batch), ends(batch)
    if feedback == "hidden":
        cross_entropy = torch.nn.functional.cross_entropy
        return of_hidden(
            model, inputs, places, torch.arange(len(gold), device=gold.device), options=candidates,
            terms=lambda logits: cross_entropy(logits.gather(1, index), gold, reduction="none"),
        )  # fmt: skip
    readout = of_scores(logits_at(model, inputs, places, candidates), gold, candidates, index)
    if feedback == "scores":
        return readout
    if feedback == "log_odds":
        return of_log_odds(readout.losses, batch["option_tokens"].gather(1, gold.unsqueeze(1)).squeeze(1))
    return of_losses(readout.losses, readout.unit)


def _of_sequences(model: nn.Module, batch: Batch, feedback: str) -> Readout:
    """Every token of every option has its position."""
    places, targets = answers(batch["input_ids"], batch["option_len"])
    lengths, groups, inputs = batch["option_len"], group_sizes(batch["num_options"]), _inputs(model, batch)

    def readout_of(log_probs: Tensor) -> Readout:
        # scores of options from their tokens' log-probabilities
        return of_sequences(log_probs, targets, lengths, groups, gold_of(batch))

    if feedback == "hidden":
        unit = readout_of(torch.zeros(len(places), device=targets.device)).unit
        return of_hidden(model, inputs, places, unit, terms=lambda p: readout_of(p).losses, targets=targets)
    readout = readout_of(log_probs_at(model, inputs, places, targets))
    if feedback == "scores":
        return readout
    if feedback == "log_odds":
        gold, unit = gold_of(batch), readout.unit
        odds = of_log_odds(readout.losses, gold)
        # a token of the right answer raises its odds, the same one of a wrong answer lowers them: a key for each pair
        first_row = torch.tensor([0, *groups[:-1]], device=gold.device).cumsum(0) + gold
        keys = readout.keys + 31 * readout.keys[(lengths.cumsum(0) - lengths)[first_row]][unit]
        return Readout(odds.values[unit], odds.slopes[unit], keys, odds.columns, readout.losses, unit)
    return of_losses(readout.losses, readout.unit)


def _counted(batch: Batch, scores: Tensor, gold: Tensor) -> Tensor:
    """The gold indices a metric compares with: the best option itself where several are right and it is one of them."""
    if "also_right" not in batch:
        return gold
    examples = batch["also_right"].split(group_sizes(batch["num_options"]))
    right = torch.nn.utils.rnn.pad_sequence(list(examples), batch_first=True)  # [B, O]
    best = scores.argmax(1, keepdim=True)
    # a right answer of several: whichever of them is the best one counts
    return torch.where(right.gather(1, best).squeeze(1), best.squeeze(1), gold)


def option_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probability of every option token.

    Returns:
        float32: [B, O] where every option is one token, else [N], row by row, N the sum of ``option_len``.
    """
    if "option_tokens" in batch:
        return log_probs_of(model, _inputs(model, batch), ends(batch), batch["option_tokens"])
    places, targets = answers(batch["input_ids"], batch["option_len"])

    def separately() -> Tensor:
        return log_probs_at(model, _inputs(model, batch), places, targets)

    if "packed" not in batch:
        return separately()
    return packing.packed_log_probs(model, batch["packed"], targets, separately)


def _means(values: Tensor, lengths: Tensor) -> Tensor:
    """Means of consecutive stretches: values [N] and lengths [R] give [R]."""
    # left-padded [R, longest] from one list of values: the last `length` places of each row
    longest = int(lengths.max())
    inside = torch.arange(longest, device=lengths.device) >= longest - lengths.unsqueeze(1)
    return values.new_zeros(inside.shape).masked_scatter(inside, values).sum(1) / lengths


def answers(input_ids: Tensor, lengths: Tensor) -> tuple[Positions, Tensor]:
    """Where the last tokens of each row are predicted, and which tokens they are.

    Args:
        input_ids: [R, T], left-padded.
        lengths: [R] how many last tokens count.

    Returns:
        (N places, [N] tokens), row by row, N the sum of ``lengths``.

    Example:
        >>> import torch
        >>> places, tokens = answers(torch.tensor([[4, 5, 6], [1, 7, 8]]), torch.tensor([2, 1]))
        >>> places.row.tolist(), places.column.tolist(), tokens.tolist()
        ([0, 0, 1], [-3, -2, -2], [5, 6, 8])
    """
    from_right = torch.arange(-input_ids.shape[1], 0, device=input_ids.device)
    # from_right = -T ... -1; the last `length` columns of a row are its option's
    row, column = (from_right >= -lengths.unsqueeze(1)).nonzero(as_tuple=True)
    # a token is predicted one position before it stands
    return Positions(row, from_right[column] - 1), input_ids[row, column]


def ends(batch: Batch) -> Positions:
    """The last position of every row, which predicts what comes behind it."""
    rows = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device)
    return Positions(rows, torch.full_like(rows, -1))


def _inputs(model: nn.Module, batch: Batch) -> Batch:
    return arguments(model, batch["input_ids"], batch["attention_mask"])


def group_sizes(num_options: Tensor) -> list[int]:
    """[2, 2, 3, 3, 3] -> [2, 3]: each row carries its example's number of options."""
    sizes, row, counts = [], 0, num_options.tolist()
    while row < len(counts):
        sizes.append(counts[row])
        row += counts[row]
    return sizes


def gold_of(batch: Batch) -> Tensor:
    """The gold index per example, from either layout."""
    labels: Tensor = batch["labels"]
    if "num_options" not in batch:
        return labels
    starts, row = [], 0
    for size in group_sizes(batch["num_options"]):
        starts.append(row)
        row += size
    return labels[starts]
