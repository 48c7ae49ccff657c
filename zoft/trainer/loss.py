"""The loss of a step: micro-batches and processes averaged as one large batch would be, in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from transformers import Trainer

from zoft.trainer.batch import Inputs, StepBatch
from zoft.weights.rounding import has_few_bits

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class LossAveraging(_Base):
    """The part of :class:`zoft.trainer.trainer.ZOMixin` that knows how the Trainer scales a loss."""

    model_accepts_loss_kwargs: bool  # the Trainer's: the model divides its loss by the token count it is given
    objective: Any  # the component that replaces the model's own loss, or None
    _called: nn.Module  # the model as the Trainer's loop hands it over
    _as_served: Callable[[Inputs], Inputs]  # the batch as the objective computes with it
    _probe_loss_scaling = False  # whether the model's use of that number is still to be found out

    def _objective_of_batch(self, batch: StepBatch) -> Tensor:
        """The objective over the micro-batches of one step, as the first-order Trainer would have accumulated it."""
        losses, counts = [], []
        for inputs in batch.micro_batches:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self._called, dict(inputs), num_items_in_batch=batch.num_items)
            losses.append(loss.float())
            counts.append(self.num_terms(inputs))
        if len(losses) == 1:
            return losses[0]
        if self.loss_is_a_share(batch):
            return torch.stack(losses).sum()
        return sum(loss * (count / sum(counts)) for loss, count in zip(losses, counts, strict=True))

    def _batch_of(self, micro_batches: list[Inputs], like: StepBatch) -> StepBatch:
        """Other rows than the step's, or a part of them: their loss is their own mean, and no share of the step's."""
        counted = like.num_items is not None
        return StepBatch(
            micro_batches, self._get_num_items_in_batch(micro_batches, self.args.device) if counted else None
        )

    def loss_is_a_share(self, batch: StepBatch) -> bool:
        """Whether micro-batch losses were already divided by the step's token count, so that they add up."""
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            return bool(self.loss_is_scaled_for_ga)
        return (self.model_accepts_loss_kwargs and batch.num_items is not None) or self.compute_loss_func is not None

    def _settle_loss_scaling(self, model: nn.Module, batch: StepBatch) -> StepBatch:
        """Find out, once, whether the model's loss really uses the token count it accepts.

        Classification heads take it and ignore it; the Trainer would then scale their loss by the number of
        micro-batches and processes. Two extra forward passes, only when there is more than one of either. All processes
        decide alike: what they gather later depends on it.
        """
        self._probe_loss_scaling, inputs = False, batch.micro_batches[0]
        if not self.model_accepts_loss_kwargs or batch.num_items is None:
            return batch
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [
                float(self.compute_loss(model, dict(inputs), num_items_in_batch=batch.num_items * factor))
                for factor in (1, 2)
            ]
        telling = bool(numpy.isfinite(losses).all()) and losses[0] != 0  # zero where no label of the batch counts
        seen = torch.tensor([telling and losses[0] != losses[1], telling], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            seen = self.accelerator.reduce(seen.to(self.args.device), reduction="sum").cpu()
        used, told = (bool(count) for count in seen)
        if not told:
            self._probe_loss_scaling = True  # nothing can be seen in such a batch: the next one is asked
        elif not used:
            self.model_accepts_loss_kwargs = False
            return StepBatch(batch.micro_batches)
        return batch

    def num_terms(self, inputs: Inputs) -> int:
        """Over how many terms the loss of a micro-batch is a mean: its weight among the others."""
        if self.objective is not None:
            return self.objective.num_terms(inputs)
        return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)

    def _over_processes(self, losses: Tensor, batch: StepBatch) -> Tensor:
        """One all-reduce: losses weighted by examples, or already shares of one mean."""
        if self.accelerator.num_processes == 1:
            return losses
        weight = 1.0 if self.loss_is_a_share(batch) else float(sum(map(self.num_terms, batch.micro_batches)))
        mine = torch.cat((losses.double() * weight, torch.tensor([weight], dtype=torch.float64)))
        total = self.accelerator.reduce(mine.to(self.args.device), reduction="sum").cpu()
        return (total[:-1] / total[-1]).float()

    def _tokens_over_processes(self, batch: StepBatch) -> int:
        """Tokens of a step, one query."""
        tokens = sum(_num_tokens(self._as_served(inputs)) for inputs in batch.micro_batches)
        if self.accelerator.num_processes == 1:
            return tokens
        mine = torch.tensor(float(tokens), dtype=torch.float64).to(self.args.device)
        return int(self.accelerator.reduce(mine, reduction="sum"))


def _num_tokens(inputs: Inputs) -> int:
    inputs = inputs.get("packed", inputs)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor):
        return int(mask.sum())
    ids = inputs.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else 0


_LOSSES = {"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "log_softmax", "kl_div"}


def with_float32_losses(objective: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The same objective, whose loss functions are given float32 whatever the model computes in.

    Several models (BERT, RoBERTa and T5 among them) hand 16-bit logits to their loss function and get 16 bits back: a
    loss of 4 is then known to 1/64 in bfloat16, and the difference of two is mostly rounding. The first call finds out
    whether a model does that; where it does not, later calls cost nothing.

    Args:
        objective: batch -> a scalar loss.

    Example:
        >>> logits, label = torch.tensor([[4.0, 1.0]], dtype=torch.bfloat16), torch.tensor([1])
        >>> with_float32_losses(lambda batch: torch.nn.functional.cross_entropy(*batch))((logits, label))
        tensor(3.0486)
    """

    def widened(value: Any) -> Any:
        return value.to(torch.float32) if isinstance(value, torch.Tensor) and has_few_bits(value) else value

    class Widen(torch.overrides.TorchFunctionMode):
        needed = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name in _LOSSES or name.endswith("_loss"):
                self.needed |= any(isinstance(a, torch.Tensor) and has_few_bits(a) for a in (*args, *kwargs.values()))
                args, kwargs = [widened(a) for a in args], {key: widened(value) for key, value in kwargs.items()}
            return func(*args, **kwargs)

    widen, called = Widen(), False

    def computed(batch: Any) -> Tensor:
        nonlocal called
        with widen if widen.needed or not called else nullcontext():
            loss = objective(batch)
        called = True
        return loss

    return computed
