"""The model's own loss, read position by position: with labels for tokens, and of sequence classifiers."""

from __future__ import annotations

from zoft.errors import UserError
from zoft.lm.logits.call import Inputs, inner
from zoft.lm.logits.head import Positions
from zoft.lm.logits.own_loss import could_be_served, predictions
from zoft.lm.objectives._counted import readout_of_tokens
from zoft.lm.objectives._readout import Readout, of_losses
from zoft.lm.objectives.classes import of_classes, read_by_head
from zoft.utils.lazy import Tensor, nn, torch


def own_feedbacks(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """What :func:`own_readout` can be asked for; empty for a loss that it does not know position by position."""
    if could_be_served(model, inputs) or is_seq2seq(model, inputs):
        return ("hidden", "loss")
    return ("scores", "log_odds", "loss") if _is_classified(model, inputs) else ()


def own_places(model: nn.Module, inputs: Inputs) -> Positions:
    """The positions that the model's own loss is read from."""
    if could_be_served(model, inputs):
        return predictions(inputs["labels"])[0]
    if is_seq2seq(model, inputs):
        return _labelled(inputs["labels"])
    if not _is_classified(model, inputs):
        raise UserError(
            f"subspace=nodes does not know which positions the loss of {type(inner(model)).__name__} is read from: "
            "give an objective (objective=options, cross_entropy, classes), or use method=mezo"
        )
    return read_by_head(model, inputs).chosen(inputs["labels"] != -100)


def own_readout(model: nn.Module, inputs: Inputs, feedback: str) -> Readout:
    """One forward, read position by position (:mod:`zoft.lm.objectives._readout`)."""
    rest = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    if could_be_served(model, inputs):
        return readout_of_tokens(model, rest, *predictions(inputs["labels"]), feedback)
    if is_seq2seq(model, inputs):
        return _of_seq2seq(model, rest | {"labels": inputs["labels"]}, feedback)
    counts = inputs["labels"] != -100
    return of_classes(model(**rest).logits.float()[counts], inputs["labels"][counts], feedback)


def is_seq2seq(model: nn.Module, inputs: Inputs) -> bool:
    """Whether this is an encoder-decoder with labels for what its decoder says, [B, L]."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    labels, bare = inputs.get("labels"), inner(model)
    whole = isinstance(labels, torch.Tensor) and labels.dim() == 2
    # most classes are ...ForConditionalGeneration, and Marian's is MarianMTModel
    names, known = [cls.__name__ for cls in type(bare).__mro__], MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    named = names[0].endswith("ForConditionalGeneration") or not set(names).isdisjoint(known)
    return whole and named and bool(bare.config.is_encoder_decoder)


def _labelled(labels: Tensor) -> Positions:
    """A decoder's position predicts the label in the same column."""
    row, column = (labels != -100).nonzero(as_tuple=True)
    return Positions(row, column - labels.shape[1])


def _of_seq2seq(model: nn.Module, inputs: Inputs, feedback: str) -> Readout:
    """The loss of each label is a term of its own; seen in what its decoder hands to the head, or in itself."""
    head, given = inner(model).get_output_embeddings(), list[Tensor]()
    with head.register_forward_pre_hook(lambda _module, args: given.append(args[0])):
        output = model(**inputs)
    places = _labelled(inputs["labels"])
    targets = inputs["labels"][inputs["labels"] != -100]
    logits = places.of(output.logits).float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    if len(losses) and not torch.isclose(losses.mean(), output.loss.float(), rtol=2e-2, atol=1e-4):
        raise UserError(
            f"the loss of {type(inner(model)).__name__} is more than the cross-entropy of its labels, and "
            "subspace=nodes does not know where the rest is read from: use method=mezo"
        )
    unit = torch.arange(len(targets), device=targets.device)
    if feedback == "loss":
        return of_losses(losses, unit)
    with torch.inference_mode(False), torch.enable_grad():
        h = places.of(given[0]).detach().clone().requires_grad_()
        logits_of_h = head(h).float()
        # what the class does behind its head (a bias) does not depend on h
        logits_of_h = logits_of_h + (logits - logits_of_h).detach()
        loss = torch.nn.functional.cross_entropy(logits_of_h, targets, reduction="sum")
        (slopes,) = torch.autograd.grad(loss, h)
    columns = torch.arange(h.shape[1], device=h.device)
    return Readout(h.detach().float(), slopes.float(), torch.zeros_like(unit), columns, losses.detach(), unit)


def _is_classified(model: nn.Module, inputs: Inputs) -> bool:
    labels = inputs.get("labels")
    whole = isinstance(labels, torch.Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    named = type(inner(model)).__name__.endswith("ForSequenceClassification") and "input_ids" in inputs
    # one output is a regression's: its loss is a square
    return whole and named and inner(model).config.num_labels > 1
