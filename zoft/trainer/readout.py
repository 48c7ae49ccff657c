"""How the trainer's objective is read position by position, for node directions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from zoft.engines._prefix import longest_stack
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.logits.call import inner
from zoft.lm.logits.head import Positions
from zoft.lm.logits.own_loss import is_causal_lm, other_than_labels
from zoft.lm.logits.support import close
from zoft.lm.objectives._own_readout import is_seq2seq, own_feedbacks, own_places, own_readout
from zoft.lm.objectives._readout import Readout
from zoft.lm.objectives.base import Objective
from zoft.lm.objectives.classes import Classes, read_by_head
from zoft.step.positions import NodePositions, at_loss
from zoft.trainer.protocol import HoldsObjects

_MOST_OPTIONS = 64  # different options in the training rows, up to which each has a response of its own
_BY_TOKENS = {"input_ids", "attention_mask", "labels", "token_type_ids", "position_ids"}
OTHER_LOSS = (
    "node directions read the cross-entropy of labels, and the trainer makes another loss of it "
    "(label_smoothing_factor, compute_loss_func, or a compute_loss of its own): leave that out, or use method=mezo "
    '(estimator="central")'
)


class TrainerReader:
    """Reads a trainer's objective, or the model's own loss where there is none."""

    def __init__(self, trainer: HoldsObjects) -> None:
        self.trainer = trainer
        self._feedback: str | None = None
        self._is_tried = False  # with a few tokens
        self._is_compared = False  # with the trainer's loss of a step's rows

    def parts(self, batch: Any) -> Sequence[Any]:
        """The micro-batches, their rows as separate ones (``packed`` rows have other positions)."""
        parts = [{key: value for key, value in one.items() if key != "packed"} for one in batch.micro_batches]
        if not self._is_tried:
            refuse_unread(self.trainer.model_wrapped, self.trainer.zo_objective)
        self._is_tried = True
        if self.trainer.zo_objective is None and not self._is_compared:
            # each process asks once, as the trainer's loss may wait for that of the others
            tells = self._compare(max(parts, key=_num_labelled))
            self._is_compared = tells or self.trainer.args.world_size > 1
        return parts

    def _compare(self, part: Any) -> bool:
        """What is read must be the loss that the trainer computes, where a ``compute_loss`` may be a user's own.

        False where no label of the rows counts, which tells nothing.
        """
        trainer, is_other = self.trainer, self.trainer.label_smoother or self.trainer.compute_loss_func
        with torch.no_grad(), trainer.compute_loss_context_manager():
            own_places(trainer.model_wrapped, part)  # what it refuses cannot be read
            read = own_readout(trainer.model_wrapped, part, "loss").losses.mean()
            loss = read if is_other else trainer.compute_loss(trainer.model_wrapped, dict(part)).float()
        tells = not bool(read.isnan())
        if is_other or (tells and not torch.isclose(read, loss, rtol=1e-2)):
            raise UserError(OTHER_LOSS)
        return tells

    def places(self, part: Any) -> NodePositions:
        """The positions that the loss is read from."""
        objective, model = self.trainer.zo_objective, self.trainer.model_wrapped
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
        objective, model = self.trainer.zo_objective, self.trainer.model_wrapped
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
        objective, estimator = trainer.zo_objective, trainer.method.estimator
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


def refuse_unread(model: nn.Module, objective: Objective | None) -> None:
    """Try a causal model or a classifier with eight tokens: its loss, and the positions it reads, must be known.

    Args:
        model: in evaluation mode.
        objective: or None for the model's own loss.

    Raises:
        UserError: its own loss is more than the cross-entropy of its labels, or it reads other positions.
    """
    model, why = getattr(model, "_orig_mod", model), None  # compiled code does not see another loss function
    bare = inner(model)
    name = type(bare).__name__
    pad = getattr(bare.config, "pad_token_id", None)
    ids = torch.tensor([[token for token in range(9) if token != pad][:8]], device=bare.device)
    if objective is None and is_causal_lm(model):
        why = other_than_labels(model, ids)
    elif name.endswith("ForSequenceClassification") and (objective is None or isinstance(objective, Classes)):
        text = bare.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:  # such a class takes one row; none of the trial's is padded
            text.pad_token_id = -1
            try:
                return refuse_unread(model, objective)
            finally:
                text.pad_token_id = None
        labels = torch.arange(min(bare.config.num_labels, 8), device=ids.device)  # all: a class may have its own weight
        ids = ids.expand(len(labels), -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        at = own_places(model, inputs) if objective is None else read_by_head(model, inputs)
        calls, last = list[int](), 0

        def turned(_module: nn.Module, _args: Any, output: Any) -> None:
            h = output[0] if isinstance(output, (tuple, list)) else output
            if h.shape[:2] == ids.shape:
                calls.append(1)
                if len(calls) == 2 * last:
                    read = h[at.row, at.column]
                    h[1:] = h[1:].flip(-1)
                    h[at.row, at.column] = read

        blocks = longest_stack(bare)
        with torch.no_grad(), blocks[-1].register_forward_hook(turned) if blocks else nullcontext():
            model(**inputs)
            last = len(calls)  # a block that all layers share runs several times: what it gives at last is turned
            output = model(**inputs)
        logits = output.logits.float()
        # the rows are alike but for what the last block gives at other positions, if it gives them one by one
        if (blocks and not last) or not close(logits, logits[:1].expand_as(logits), 1e-2):
            raise UserError(
                f"the classifier of {name} reads other positions than the one of each row that subspace=nodes moves "
                '(it may take their mean, or shorten rows): use method=mezo (estimator="central")'
            )
        off = abs(float(torch.nn.functional.cross_entropy(logits, labels) - output.loss)) if objective is None else 0.0
        why = f"it is off by {off:.2g}" if off > (1e-4 if output.logits.element_size() > 2 else 2e-2) else None
    if why:
        raise UserError(
            f"the loss of {name} is more than the cross-entropy of its labels ({why}), and subspace=nodes does not "
            'know where the rest is read from: use method=mezo (estimator="central")'
        )


def last_tokens(part: Any, last: int) -> Any:
    """The last tokens of each row; None where they are more than half of them, or it is not known what goes by tokens.

    Example:
        >>> last_tokens({"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([0])}, 2)["input_ids"]
        tensor([[3, 4]])
    """
    shape = part["input_ids"].shape
    by_tokens = {name for name, value in part.items() if isinstance(value, Tensor) and value.shape[:2] == shape}
    # more than half of a row: keeping a context would save less than it costs; and a row may have as many options as
    # tokens, so that shapes alone do not tell them apart
    if 2 * last > shape[1] or by_tokens - _BY_TOKENS:
        return None
    return {name: value[:, -last:] if name in by_tokens else value for name, value in part.items()}


def _num_labelled(part: Any) -> int:
    """How many labels count."""
    labels = part.get("labels")
    return int((labels != -100).sum()) if isinstance(labels, Tensor) else 0


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
