"""The method of a trainer that is given none: node directions where they serve, else MeZO's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.trainer_utils import number_of_arguments

from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.logits.call import inner
from zoft.lm.logits.own_loss import is_causal_lm
from zoft.lm.logits.support import FAILURES
from zoft.lm.models.agreement import align
from zoft.lm.objectives.base import Objective
from zoft.optimizers.whiten import Whiten
from zoft.step.method import Method
from zoft.subspaces.nodes import Nodes as NodeOutputs
from zoft.trainer.readout import OTHER_LOSS, refuse_unread
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)


def may_be(args: Any, engine: str, objective: Objective | None) -> bool:
    """Whether node directions can serve, as far as it is known without the model: no rate, clip or compiling is set.

    Args:
        args: of the trainer, with zoft's fields.
        engine: its name.
        objective: or None for the model's own loss.
    """
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate not in (default, "auto") or args.max_grad_norm or engine not in ("auto", "nodes"):
        return False
    if args.torch_compile:
        return False  # it does not show the last hidden state
    return objective is None or objective.feedbacks not in ((), ("loss",))


def recommended(
    model: nn.Module | None, objective: Objective | None, args: Any, given: Mapping[str, Any], other: bool
) -> Method | None:
    """Node directions as ``method=zoft`` has them; None where the loss or what is trained does not go with them.

    Args:
        model: with the weights chosen that are trained; None where ``model_init`` makes it, which is called for a look.
        objective: or None for the model's own loss.
        args: of the trainer.
        given: to the trainer besides: rows, a tokenizer, a loss.
        other: whether the trainer makes another loss of the model's.
    """
    if model is None and (make := given.get("model_init")) is not None:
        model = make(None) if number_of_arguments(make) else make()
    align(model, given.get("processing_class"))
    other = bool(other or given.get("compute_loss_func") or (objective is None and args.label_smoothing_factor))
    try:
        row = given.get("train_dataset")[0]  # type: ignore[index]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return None
    if model is None or not isinstance(row, Mapping) or (objective is None and not _is_read(model, row)):
        return None
    outputs = NodeOutputs()
    try:
        outputs.chosen(Weights(model))
    except UserError:
        return None
    try:
        if other:
            raise UserError(OTHER_LOSS)
        refuse_unread(model.eval(), objective)  # as in every query
    except FAILURES as error:  # a UserError, or what a class raises for labels that it does not take
        log.warning("no method is named: MeZO's parts (full, central, sgd) are taken: %s", error)
        return None
    log.warning(
        "no method is named: node directions (method=zoft), which learn from the fewest queries; name a part, "
        'e.g. estimator="central", for directions in the weights'
    )
    return Method(outputs, Nodes(), Method.of().weighting, Whiten(learning_rate=4.0))


def _is_read(model: nn.Module, row: Mapping[str, Any]) -> bool:
    """Whether the model's own loss of such rows is known position by position."""
    labels = row.get("labels", row.get("label"))
    if isinstance(labels, int):
        return type(inner(model)).__name__.endswith("ForSequenceClassification")
    ids = row.get("input_ids")
    return is_causal_lm(model) and labels is not None and ids is not None and len(labels) == len(ids)
