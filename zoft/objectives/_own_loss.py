"""The loss that a causal language model computes from ``labels``, with the head on the labelled positions only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from zoft.lazy import torch
from zoft.objectives._calls import Inputs, inner
from zoft.objectives._head import Places
from zoft.objectives._logits import log_probs_at
from zoft.objectives._served import FAILURES, piece_of, refuse, served, tolerance_of, trials_allowed
from zoft.objectives._served import is_known as is_known_head

if TYPE_CHECKING:
    from torch import Tensor, nn

_WHAT = "the loss is computed from the logits of all positions, not only from those that have a label"

_agrees: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def own_loss(model: nn.Module, **inputs: Any) -> Any:
    """What ``model(**inputs)`` gives, as far as its loss is concerned.

    The two are compared once, on a piece of the first batch; where they differ, and for every other kind of model or
    of labels, this is ``model(**inputs)``.

    Args:
        model: any model.
        inputs: its keyword arguments, with ``labels`` and perhaps ``num_items_in_batch``.

    Returns:
        ``{"loss": scalar}``, or the model's own output.
    """
    if not _is_served(model, inputs):
        return model(**inputs)
    return {"loss": _loss_of_labels(model, inputs)}


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the class is one of transformers' causal language models with their common loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    bare = inner(model)
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return (
        any(cls.__name__ in names for cls in type(bare).__mro__)
        and not bare.config.is_encoder_decoder
        and bare.loss_function is ForCausalLMLoss
    )


def is_known(model: nn.Module, inputs: Inputs) -> bool:
    """Whether nothing would have to be tried before the loss of these inputs is computed."""
    return ("num_items_in_batch" in inputs) in _agrees.get(model, {}) or not _could_be_served(model, inputs)


def _is_served(model: nn.Module, inputs: Inputs) -> bool:
    if not _could_be_served(model, inputs):
        return False
    counted = "num_items_in_batch" in inputs  # some classes take it and do not use it
    known = _agrees.setdefault(model, {})
    if counted not in known:
        with torch.no_grad():
            agrees = _compare(model, inputs) if trials_allowed() else None
        if agrees is None:
            return False
        known[counted] = agrees
    return known[counted]


def _could_be_served(model: nn.Module, inputs: Inputs) -> bool:
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor) or labels.shape != ids.shape:
        return False
    return "shift_labels" not in inputs and is_causal_lm(model)


def _loss_of_labels(model: nn.Module, inputs: Inputs) -> Tensor:
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    places, targets = _predictions(inputs["labels"])
    total = -log_probs_at(model, rest, places, targets).sum() if len(places) else inputs["labels"].new_zeros(()).float()
    count = inputs.get("num_items_in_batch")
    return total / (len(places) if count is None else torch.as_tensor(count, device=total.device))


def _predictions(labels: Tensor) -> tuple[Places, Tensor]:
    """Where the labelled tokens are predicted, one position before each, and which they are."""
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return Places(row, column - labels.shape[1]), labels[row, column + 1]


def _compare(model: nn.Module, inputs: Inputs) -> bool | None:
    """Whether the model's loss is this one; None where the batch does not tell: no label, or nothing finite."""
    places, _ = _predictions(inputs["labels"])
    if not len(places):
        return None
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    try:
        known = served(model, rest, places)
        if not known.rows:
            return False if is_known_head(model) else None  # why has been said
        around = Places(places.row, places.column + 1)  # so that the labels themselves lie in the piece
        piece, _ = piece_of(rest | {"labels": inputs["labels"]}, around, known.vocabulary)
        if "num_items_in_batch" in inputs:
            piece["num_items_in_batch"] = torch.tensor(3 * len(places), device=places.row.device)
        found = float(_loss_of_labels(model, piece))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        refuse(model, _WHAT, error)
        return False
    output = model(**piece)
    wanted = float(output[0] if isinstance(output, tuple) else output["loss"])
    if not math.isfinite(wanted) or not wanted:
        return None
    if abs(found - wanted) <= tolerance_of(model) * abs(wanted):
        return True
    refuse(model, _WHAT, f"its own loss would be off by {abs(found - wanted):.2g}")
    return False
