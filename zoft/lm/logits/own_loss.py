"""The loss that a causal language model computes from ``labels``, with the head on the labelled positions only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from zoft.lm.logits.call import Inputs, inner
from zoft.lm.logits.head import Positions
from zoft.lm.logits.logits import log_probs_here
from zoft.lm.logits.support import FAILURES, piece_of, probe, refuse, tolerance_of, trials_allowed
from zoft.lm.logits.support import is_known as is_known_head
from zoft.utils.lazy import Tensor, nn, torch

_WHAT = "the loss is computed from the logits of all positions, not only from those that have a label"

_agrees: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def own_loss(model: nn.Module, **inputs: Any) -> Any:
    """The loss of ``model(**inputs)``, with the head on the labelled positions where that is the same.

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
    # a class of the library's own or derived from one, whose loss is the common one and not replaced
    return (
        any(cls.__name__ in names for cls in type(bare).__mro__)
        and not bare.config.is_encoder_decoder
        and bare.loss_function is ForCausalLMLoss
    )


def is_known(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the loss of these inputs can be computed without probing the model first."""
    return _way_of_calling(model, inputs) in _agrees.get(model, {}) or not could_be_served(model, inputs)


def _way_of_calling(model: nn.Module, inputs: Inputs) -> tuple[object, ...]:
    """What a class may let its loss depend on besides the rows: some take a count and do not use it."""
    bare = inner(model)
    router = getattr(getattr(bare, "config", None), "output_router_logits", None)
    # a loss function of the model's own, which can be put in the class's place at any time
    return frozenset(inputs), model.training, router, id(vars(bare).get("_loss_function"))


def _is_served(model: nn.Module, inputs: Inputs) -> bool:
    if not _labels_tokens(inputs):
        return False
    # by way of calling: the same class may add a term when it is given a count
    way, known = _way_of_calling(model, inputs), _agrees.setdefault(model, {})
    if way not in known:
        if not is_causal_lm(model):
            return False
        with torch.no_grad():
            agrees = _compare(model, inputs) if trials_allowed() else None
        if agrees is None:
            return False
        known[way] = agrees
    return known[way]


def could_be_served(model: nn.Module, inputs: Inputs) -> bool:
    """Whether this is a causal model's loss of labels for its own tokens."""
    return _labels_tokens(inputs) and is_causal_lm(model)


def _labels_tokens(inputs: Inputs) -> bool:
    """Whether there is a label for each token, which nobody has shifted yet."""
    ids, labels = inputs.get("input_ids"), inputs.get("labels")
    of_tokens = isinstance(ids, torch.Tensor) and isinstance(labels, torch.Tensor) and labels.shape == ids.shape
    return of_tokens and "shift_labels" not in inputs


def _loss_of_labels(model: nn.Module, inputs: Inputs) -> Tensor:
    # labels are left out: the class's own loss would take the logits of all positions
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    positions, targets = predictions(inputs["labels"])
    total = (
        -log_probs_here(model, rest, positions, targets).sum()
        if len(targets)
        else inputs["labels"].new_zeros(()).float()
    )
    count = inputs.get("num_items_in_batch")
    # L = -sum log p / n, n the labels or what the Trainer counted over all micro-batches
    return total / (len(targets) if count is None else torch.as_tensor(count, device=total.device))


def predictions(labels: Tensor) -> tuple[Positions, Tensor]:
    """Where the labelled tokens are predicted, one position before each, and which they are."""
    # label t is predicted at position t - 1
    row, column = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return Positions(row, column - labels.shape[1]), labels[row, column + 1]


def _compare(model: nn.Module, inputs: Inputs) -> bool | None:
    """Whether the model's loss is this one; None where the batch does not tell: no label, or nothing finite."""
    positions, _ = predictions(inputs["labels"])
    if not len(positions):
        return None
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    try:
        known = probe(model, rest, positions)
        if not known.rows:
            return False if is_known_head(model) else None  # why has been said
        around = Positions(positions.row, positions.column + 1)  # so that the labels themselves lie in the piece
        piece, _ = piece_of(rest | {"labels": inputs["labels"]}, around, known.vocabulary)
        # a count that no batch has: where the class does not divide by it, the losses differ
        if "num_items_in_batch" in inputs:
            piece["num_items_in_batch"] = torch.tensor(3 * len(positions), device=positions.row.device)
        loss = float(_loss_of_labels(model, piece))
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        refuse(model, _WHAT, error)
        return False
    output, calls = _with_marked_loss(model, piece)
    differs = _difference(output, calls, piece)
    if differs is None and calls:
        # the cross-entropy itself must agree, up to the rounding of the logits
        wanted = calls[0].loss
        if not math.isfinite(wanted) or not wanted:
            return None
        if abs(loss - wanted) > tolerance_of(model) * abs(wanted):
            differs = f"its own loss would be off by {abs(loss - wanted):.2g}"
    if differs is None:
        return True
    refuse(model, _WHAT, differs)
    return False


def other_than_labels(model: nn.Module, input_ids: Tensor) -> str | None:
    """What besides the cross-entropy of its next tokens a causal model's loss consists of; None for nothing."""
    piece = {"input_ids": input_ids, "labels": input_ids}
    return _difference(*_with_marked_loss(model, piece), piece)


@dataclass
class _LossCall:
    """One call of the class's loss function, in a forward of which it returned :data:`_MARK` instead of the loss."""

    loss: float
    returned: Tensor
    version: int


_MARK = 2.0**-100
"""Whatever a class adds to its cross-entropy, however little, shows beside so small a number; so does a factor."""


def _with_marked_loss(model: nn.Module, piece: Inputs) -> tuple[Any, list[_LossCall]]:
    """The model's output where its loss function returns the mark, and the calls of that function."""
    bare, calls = inner(model), []
    real, earlier = bare.loss_function, vars(bare).get("_loss_function")

    def marked(*args: Any, **kwargs: Any) -> Tensor:
        loss = real(*args, **kwargs)
        # the mark in place of the loss: what the class adds or multiplies afterwards shows beside it
        mark = torch.full_like(loss, _MARK)
        calls.append(_LossCall(float(loss), mark, mark._version))
        return mark

    bare.loss_function = marked
    try:
        with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count what is written into them
            return model(**piece), calls
    finally:
        if earlier is None:
            del bare._loss_function
        else:
            bare.loss_function = earlier


def _difference(output: Any, calls: list[_LossCall], piece: Inputs) -> str | None:
    """What besides the plain cross-entropy of its logits the model's loss consists of; None for nothing."""
    loss, logits = output[:2] if isinstance(output, tuple) else (output["loss"], output["logits"])
    if len(calls) != 1:
        return f"its loss function is called {len(calls)} times in a forward"
    (call,) = calls
    if float(loss) != _MARK:
        return f"its own loss would be off by {abs(float(loss) - _MARK):.2g}"
    # A term that is zero here may not be so later: the very tensor comes back, and nothing was written into it.
    if loss.device == call.returned.device and (loss is not call.returned or loss._version != call.version):
        return "it goes on computing with its cross-entropy"
    positions, targets = predictions(piece["labels"])
    total = torch.nn.functional.cross_entropy(positions.of(logits).float(), targets, reduction="sum")
    plain = float(total) / float(piece.get("num_items_in_batch", len(positions)))
    off = abs(plain - call.loss)
    # Two orders of one float32 sum: far closer than any two ways of computing 16-bit logits.
    return f"its own loss would be off by {off:.2g}" if off > 1e-5 * abs(call.loss) else None
