"""The loss of a step: micro-batches and processes averaged as one large batch would be, in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from zoft.errors import UserError
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.processes import Processes
from zoft.trainer.protocol import HoldsObjects
from zoft.weights.rounding import has_few_bits


class StepLoss:
    """The objective of a step: micro-batches and processes averaged as the first-order Trainer would.

    Args:
        trainer: computes the loss of a micro-batch.
        processes: over which it is averaged.
    """

    def __init__(self, trainer: HoldsObjects, processes: Processes) -> None:
        trainer.compute_loss = as_one_number(trainer.compute_loss)
        self.trainer = trainer
        self.processes = processes
        self.asks_for_scaling = False  # whether the model's use of the token count is still to be found out

    def of(self, batch: StepBatch) -> Tensor:
        """The objective over the micro-batches of one step, as the first-order Trainer would have accumulated it.

        Or that of each of their examples, [B], where the batch asks for it.
        """
        trainer, losses = self.trainer, []
        of_each = {"of_each": True} if batch.of_each else {}
        for inputs in batch.micro_batches:
            # autocast as the Trainer would have it, around one micro-batch
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(
                    trainer.model_wrapped, dict(inputs), num_items_in_batch=batch.num_items, **of_each
                )
            # 16 bits of a loss of 4 are steps of 1/64: differences of two would be mostly rounding
            losses.append(loss.float())
        return self.joined(batch, losses)

    def parts(self, batch: StepBatch) -> list[StepBatch]:
        """A batch for each of its micro-batches, whose losses are :meth:`joined`."""
        return [replace(batch, micro_batches=[inputs]) for inputs in batch.micro_batches]

    def joined(self, batch: StepBatch, losses: Sequence[Any]) -> Tensor:
        """The loss of a step from those of its micro-batches, in their order."""
        if batch.of_each:
            return torch.cat(list(losses))
        # one micro-batch: its own mean, with no rounding by a weight
        if len(losses) == 1:
            return losses[0]
        # L = sum_b L_b, each divided by the step's token count already
        if self.is_a_share(batch):
            return torch.stack(list(losses)).sum()
        # L = sum_b n_b L_b / sum_b n_b over the micro-batches b, n_b the terms of b's mean
        counts = [self.num_terms(inputs) for inputs in batch.micro_batches]
        return sum(loss * (count / sum(counts)) for loss, count in zip(losses, counts, strict=True))

    def batch_of(self, micro_batches: list[Inputs], like: StepBatch) -> StepBatch:
        """A batch of other rows than the step's, or of part of them: its loss is a mean, no share of the step's."""
        # no count where the step has none: the class would divide by it
        if like.num_items is None:
            return StepBatch(micro_batches)
        return StepBatch(micro_batches, self.trainer._get_num_items_in_batch(micro_batches, self.processes.device))

    def is_a_share(self, batch: StepBatch) -> bool:
        """Whether micro-batch losses were already divided by the step's token count, so that they add up."""
        trainer = self.trainer
        # TRL says itself whether its loss is divided
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # TRL's own word on it, where it has one
        if scaled is not None:
            return bool(scaled)
        return (trainer.model_accepts_loss_kwargs and batch.num_items is not None) or (
            trainer.compute_loss_func is not None
        )

    def settle_scaling(self, batch: StepBatch) -> StepBatch:
        """Find out, once, whether the model's loss really uses the token count it accepts.

        Classification heads take it and ignore it; the Trainer would then scale their loss by the number of
        micro-batches and processes. Two extra forward passes, only when there is more than one of either. All processes
        decide alike: what they gather later depends on it.
        """
        trainer, inputs = self.trainer, batch.micro_batches[0]
        self.asks_for_scaling = False
        if not trainer.model_accepts_loss_kwargs or batch.num_items is None:
            return batch
        with torch.no_grad(), trainer.compute_loss_context_manager():
            losses = [
                float(
                    trainer.compute_loss(
                        trainer.model_wrapped, dict(inputs), num_items_in_batch=batch.num_items * factor
                    )
                )
                # twice the count: a loss that is divided by it is halved, one that ignores it stays
                for factor in (1, 2)
            ]
        tells = bool(numpy.isfinite(losses).all()) and losses[0] != 0  # zero where no label of the batch counts
        # both facts in one all-reduce: true where they hold in any process
        uses, tells = map(bool, self.processes.sum(torch.tensor([tells and losses[0] != losses[1], tells])))
        if not tells:
            self.asks_for_scaling = True  # nothing can be seen in such a batch: the next one is asked
        elif not uses:
            trainer.model_accepts_loss_kwargs = False
            return StepBatch(batch.micro_batches)
        return batch

    def num_terms(self, inputs: Inputs) -> int:
        """Over how many terms the loss of a micro-batch is a mean: its weight among the others."""
        objective = self.trainer.zo_objective
        if objective is not None:
            # rows of the first tensor: what a loss without an objective is taken to be a mean over
            return int(objective.num_terms(inputs))
        return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)

    def over_processes(self, losses: Tensor, batch: StepBatch) -> Tensor:
        """One all-reduce: losses weighted by examples, or already shares of one mean."""
        if self.processes.count == 1:
            # one process: no weighing, and no rounding by it
            return losses
        # L = sum_r n_r L_r / sum_r n_r over the processes r, each with a loss that is a mean of n_r terms
        weight = 1.0 if self.is_a_share(batch) else float(sum(map(self.num_terms, batch.micro_batches)))
        total = self.processes.sum(torch.cat((losses.double() * weight, torch.tensor([weight], dtype=torch.float64))))
        return (total[:-1] / total[-1]).float()


def as_one_number(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of the user's own as a tensor, whatever kind of number it is.

    Raises:
        UserError: in a call whose loss is none, or has several elements.

    Example:
        >>> as_one_number(lambda model, inputs: 0.5)(None, {})
        tensor(0.5000)
    """

    @functools.wraps(compute_loss)
    def computed(*args: Any, **kwargs: Any) -> Any:
        found = compute_loss(*args, **kwargs)
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        try:
            loss = loss if isinstance(loss, Tensor) else torch.tensor(float(loss))
        except (TypeError, ValueError):
            raise UserError(f"compute_loss must return a number, got {type(loss).__name__}") from None
        if loss.numel() != 1 and not kwargs.get("of_each"):
            raise UserError(
                f"compute_loss must return one number, got a tensor of shape {list(loss.shape)}: take its mean()"
            )
        return (loss, *outputs) if isinstance(found, tuple) else loss

    return computed


def num_tokens(micro_batches: Iterable[Inputs]) -> int:
    """Tokens that a query of these micro-batches computes with."""
    total = 0
    for inputs in micro_batches:
        # packed rows are those that are computed
        inputs = inputs.get("packed", inputs)
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if isinstance(mask, Tensor):
            total += int(mask.sum())
        elif isinstance(ids, Tensor):
            total += ids.numel()
    return total


_LOSSES = {"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "log_softmax", "kl_div"}


def with_float32_losses(objective: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The same objective, whose loss functions are given float32 whatever the model computes in.

    Several models (BERT, RoBERTa and T5 among them) hand 16-bit logits to their loss function and get 16 bits back: a
    loss of 4 is then known to 1/64 in bfloat16, and the difference of two is mostly rounding. The first call finds out
    whether a model does that; where it does not, later calls cost nothing.

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
        # after the first call, only where it was seen to be needed: a function mode costs every operation
        with widen if widen.needed or not called else nullcontext():
            loss = objective(batch)
        called = True
        return loss

    return computed
