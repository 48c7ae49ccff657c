"""Classification over answer options by their mean log-likelihood (MeZO's `train_as_classification`)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoft.lazy import torch
from zoft.objectives.base import Batch, Objective

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass
class Options(Objective):
    """Cross-entropy over each example's options, scored by the mean log-probability of the option's tokens.

    A batch comes in one of two layouts, both left-padded (:mod:`zoft.data.tokens` chooses):

    * one row a prompt, when every option is one token: ``input_ids`` [B, T], ``option_tokens`` [B, O], ``labels`` [B];
    * one row an option: ``input_ids`` [R, T] with R = sum of ``num_options``, ``option_len`` [R], ``num_options`` [R]
      and ``labels`` [R] (the gold index, the same on every row of an example).

    Only the positions that predict an option's tokens go through the language-model head.

    References: Malladi et al. 2023 (MeZO), the published `forward_wrap_with_option_len`.
    """

    def num_terms(self, batch: Batch) -> int:
        """Prompts, not rows."""
        return len(gold_of(batch))

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, scores [B, O], gold index [B]); options that an example lacks score -inf."""
        scores = (
            self._scores_of_tokens(model, batch) if "option_tokens" in batch else self._scores_of_rows(model, batch)
        )
        gold = gold_of(batch)
        return torch.nn.functional.cross_entropy(scores, gold), scores, gold

    def _scores_of_tokens(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = last_logits(model, batch["input_ids"], batch["attention_mask"], 1)[:, -1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, batch["option_tokens"])

    def _scores_of_rows(self, model: nn.Module, batch: Batch) -> Tensor:
        lengths = batch["option_len"]
        longest = int(lengths.max())
        logits = last_logits(model, batch["input_ids"], batch["attention_mask"], longest + 1)[:, :-1].float()
        targets = batch["input_ids"][:, -longest:]
        log_probs = torch.log_softmax(logits, dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)  # [R, longest]
        inside = torch.arange(longest, device=lengths.device) >= longest - lengths.unsqueeze(1)
        rows = (log_probs * inside).sum(1) / lengths  # [R]
        sizes = group_sizes(batch["num_options"])
        return torch.nn.utils.rnn.pad_sequence(list(rows.split(sizes)), batch_first=True, padding_value=-torch.inf)


def last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """Logits at the last ``count`` positions of left-padded rows, [B, count, V].

    The head is applied to those positions only where the model can do that (``logits_to_keep``).
    """
    accepted = _accepted(type(_inner(model)))
    extra: dict[str, Any] = {}
    if "logits_to_keep" in accepted:
        # As indices, not as a number: a slice of the hidden states is not contiguous, and the head would then be one
        # small product per row that reads the whole vocabulary matrix each time (75 ms instead of 10 for 16 rows).
        extra["logits_to_keep"] = torch.arange(-count, 0, device=input_ids.device)
    if "position_ids" in accepted:
        extra["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min_(0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra).logits
    return logits[:, -count:]


def _inner(model: Any) -> Any:
    """The transformers model inside adapters and compilation."""
    inner = getattr(model, "_orig_mod", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _accepted(cls: type) -> frozenset[str]:
    if cls not in _ACCEPTED:
        _ACCEPTED[cls] = frozenset(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    return _ACCEPTED[cls]


_ACCEPTED: dict[type, frozenset[str]] = {}


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
