"""Classification by a head with an output for each class."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.logits.call import called, inner, refuse_elsewhere
from zoft.lm.logits.head import Positions
from zoft.lm.objectives._readout import Readout, of_log_odds, of_losses, of_scores
from zoft.lm.objectives.base import Batch, Objective
from zoft.utils.lazy import Tensor, nn, torch


@dataclass
class Classes(Objective):
    """Cross-entropy over the classes of a sequence classifier, such as the fresh head of ``task.prompt=head``.

    A batch is right-padded: ``input_ids`` [B, T] and ``labels`` [B].
    """

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows for a classification head."""
        return ("head",)

    def num_terms(self, batch: Batch) -> int:
        """Examples."""
        return len(batch["labels"])

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits of the classes [B, C], gold class [B])."""
        refuse_elsewhere(model)
        scores = called(model, {name: batch[name] for name in ("input_ids", "attention_mask")}).float()
        return torch.nn.functional.cross_entropy(scores, batch["labels"]), scores, batch["labels"]

    @property
    def feedbacks(self) -> tuple[str, ...]:
        """Scores of classes; losses alone."""
        return ("scores", "log_odds", "loss")

    def places(self, model: nn.Module, batch: Batch) -> Positions:
        """The position that the head reads."""
        return read_by_head(model, batch)

    def readout(self, model: nn.Module, batch: Batch, feedback: str) -> Readout:
        """One position an example."""
        _, scores, gold = self.predict(model, batch)
        return of_classes(scores, gold, feedback)


def of_classes(scores: Tensor, gold: Tensor, feedback: str) -> Readout:
    """A classifier's logits [B, C] as the kind of readout that ``feedback`` names."""
    readout = of_scores(scores, gold, torch.arange(scores.shape[1], device=scores.device))
    if feedback == "scores":
        return readout
    return of_log_odds(readout.losses, gold) if feedback == "log_odds" else of_losses(readout.losses, readout.unit)


def read_by_head(model: nn.Module, batch: Batch) -> Positions:
    """Which position a sequence classifier reads: an encoder's first, else the last of each row that is no padding."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = inner(model).config
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"subspace=nodes does not know which positions the classifier of {type(inner(model)).__name__} reads: use "
            "a decoder or an encoder, or method=mezo"
        )
    ids = batch["input_ids"]
    rows, length = torch.arange(len(ids), device=ids.device), ids.shape[1]
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return Positions(rows, torch.full_like(rows, -length))
    # transformers' classes look for the padding's id, whatever the mask: it is often the end token's, too
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if pad is None and len(ids) > 1:
        raise UserError(
            f"the classifier of {type(inner(model)).__name__} takes one row at a time, as its config has no "
            "pad_token_id: set model.config.pad_token_id to the tokenizer's, or train with batches of one row"
        )
    last = torch.full_like(rows, -1) if pad is None else (ids != pad).int().cumsum(1).argmax(1) - length
    return Positions(rows, last)
