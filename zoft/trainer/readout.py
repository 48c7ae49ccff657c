"""How the trainer's objective is read position by position, for node directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.logits.head import Positions
from zoft.lm.objectives._own_readout import is_seq2seq, own_feedbacks, own_places, own_readout
from zoft.lm.objectives._readout import Readout
from zoft.step.positions import NodePositions, at_loss
from zoft.trainer.protocol import HoldsObjects

_MOST_OPTIONS = 64  # different options in the training rows, up to which each has a response of its own


class TrainerReader:
    """Reads a trainer's objective, or the model's own loss where there is none."""

    def __init__(self, trainer: HoldsObjects) -> None:
        self.trainer = trainer
        self._feedback: str | None = None

    def parts(self, batch: Any) -> Sequence[Any]:
        """The micro-batches, their rows as separate ones (``packed`` rows have other positions)."""
        return [{key: value for key, value in one.items() if key != "packed"} for one in batch.micro_batches]

    def places(self, part: Any) -> NodePositions:
        """The positions that the loss is read from."""
        objective, model = self.trainer.objective, self.trainer.model_wrapped
        positions: Positions = own_places(model, part) if objective is None else objective.places(model, part)
        if objective is None and is_seq2seq(model, part):  # of what the decoder says
            labels = part["labels"]
            # -T: a decoder's rows begin at the left end, whatever the encoder's padding
            return at_loss(
                positions.row, positions.column, torch.full((len(labels),), -labels.shape[1], device=labels.device)
            )
        return at_loss(positions.row, positions.column, _starts(part))

    def new_cache(self) -> Any:
        """An empty cache of keys and values."""
        return DynamicCache()

    def tail(self, part: Any, last: int) -> Any:
        """The last tokens of each row alone; None where they are not much less, or texts are written."""
        return None if "prompt_ids" in part else last_tokens(part, last)

    def read(self, part: Any) -> Readout:
        """One forward, as the estimator's feedback asks."""
        objective, model = self.trainer.objective, self.trainer.model_wrapped
        feedback = self.feedback(part)
        # exact: a probe-free reference, whose forward gives losses with a graph
        feedback = "loss" if feedback == "exact" else feedback
        with self.trainer.compute_loss_context_manager():
            if objective is None:
                return own_readout(model, part, feedback)
            return objective.readout(model, part, feedback)

    def feedback(self, part: Any) -> str:
        """What the estimator asks for; of ``auto``, what the objective has and its options are few enough for."""
        if self._feedback is None:
            self._feedback = self._chosen(part)
        return self._feedback

    def _chosen(self, part: Any) -> str:
        trainer = self.trainer
        objective, estimator = trainer.objective, trainer.method.estimator
        assert isinstance(estimator, Nodes)
        # the identity is a response of the last hidden state
        wanted = "hidden" if estimator.response == "identity" else estimator.feedback
        feedbacks = own_feedbacks(trainer.model_wrapped, part) if objective is None else objective.feedbacks
        if wanted == "exact" or wanted in feedbacks:
            return str(wanted)
        if wanted == "auto" and feedbacks == ("loss",):
            raise UserError(
                f"objective={objective.name()} tells each example's loss and nothing else: give "
                "estimator=Nodes(feedback='loss', every=1)"
            )
        if wanted != "auto":
            name = "the model's own loss" if objective is None else f"objective={objective.name()}"
            has = ", ".join(feedbacks) or "none"
            raise UserError(f"estimator.feedback={wanted} is not what {name} has: choose one of {has}, or auto")
        # with many options each would have a response of its own, learnt from few examples
        if "scores" in feedbacks and "hidden" in feedbacks and _num_options(trainer.train_dataset) > _MOST_OPTIONS:
            return "hidden"
        return feedbacks[0]


def last_tokens(part: Any, last: int) -> Any:
    """The last tokens of each row, of all [B, T] tensors; None where they are more than half of them.

    Example:
        >>> last_tokens({"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([0])}, 2)["input_ids"]
        tensor([[3, 4]])
    """
    shape = part["input_ids"].shape
    # more than half of a row: keeping a context would save less than it costs
    if 2 * last > shape[1]:
        return None
    return {
        name: value[:, -last:] if isinstance(value, Tensor) and value.shape[:2] == shape else value
        for name, value in part.items()
    }


def _starts(part: Any) -> Tensor:
    """Each row's first token, counted from the right end."""
    if "prompt_ids" in part:  # texts are written behind these
        # texts have no row of their own yet: they are written behind their prompts
        return -torch.tensor([len(prompt) for prompt in part["prompt_ids"]], device=part["input_ids"].device)
    mask = part.get("attention_mask", torch.ones_like(part["input_ids"]))
    # the first 1 of the mask: left padding is in front of it
    return mask.int().argmax(1) - mask.shape[1]


def _num_options(rows: Any) -> int:
    """How many different options the rows have, as far as it matters."""
    seen: set[tuple[int, ...]] = set()
    for row in rows:
        if not isinstance(row, dict) or "sequences" not in row:
            return 0
        lengths = zip(row["sequences"], row["lengths"], strict=True)
        seen |= {tuple(sequence[len(sequence) - length :]) for sequence, length in lengths}
        if len(seen) > _MOST_OPTIONS:
            break
    return len(seen)
