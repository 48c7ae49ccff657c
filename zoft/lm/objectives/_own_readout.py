"""The model's own loss, told position by position: of causal models with labels, and of sequence classifiers."""

from __future__ import annotations

from zoft.errors import UserError
from zoft.lm.logits.call import Inputs, inner
from zoft.lm.logits.head import Positions
from zoft.lm.logits.own_loss import could_be_served, predictions
from zoft.lm.objectives._counted import readout_of_tokens
from zoft.lm.objectives._readout import Readout
from zoft.lm.objectives.classes import of_classes, read_by_head
from zoft.utils.lazy import nn, torch


def own_feedbacks(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """What :func:`own_readout` can be asked for; empty for a loss that it does not know position by position."""
    if could_be_served(model, inputs):
        return ("hidden", "loss")
    return ("scores", "log_odds", "loss") if _is_classified(model, inputs) else ()


def own_places(model: nn.Module, inputs: Inputs) -> Positions:
    """The positions that the model's own loss is read from."""
    if could_be_served(model, inputs):
        return predictions(inputs["labels"])[0]
    if not _is_classified(model, inputs):
        raise UserError(
            f"subspace=nodes does not know which positions the loss of {type(inner(model)).__name__} is read from: "
            "give an objective (objective=options, cross_entropy, classes), or use method=mezo"
        )
    return read_by_head(model, inputs)


def own_readout(model: nn.Module, inputs: Inputs, feedback: str) -> Readout:
    """One forward, told position by position (:mod:`zoft.lm.objectives._readout`)."""
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    if could_be_served(model, inputs):
        return readout_of_tokens(model, rest, *predictions(inputs["labels"]), feedback)
    return of_classes(model(**rest).logits.float(), inputs["labels"], feedback)


def _is_classified(model: nn.Module, inputs: Inputs) -> bool:
    labels = inputs.get("labels")
    whole = isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return whole and type(inner(model)).__name__.endswith("ForSequenceClassification") and "input_ids" in inputs
