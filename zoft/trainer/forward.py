"""The forward of a query: how the model is called, and what is left out because the loss does not need it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from zoft.engines._frozen_prefix import FrozenPrefix
from zoft.engines._lockstep import sequential
from zoft.lm.data.packing import one_of_each_size
from zoft.lm.formats import require_rows
from zoft.lm.logits.head import narrowed
from zoft.lm.logits.own_loss import is_known, own_loss
from zoft.lm.logits.packing import serves
from zoft.lm.logits.support import no_trials
from zoft.lm.models.agreement import align
from zoft.lm.models.peft._positions import count_by_mask
from zoft.lm.models.quantized import is_quantized
from zoft.lm.models.scales import has_trained_scales
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.beginning import RunIdentity
from zoft.trainer.narrow import check_narrow, feed_forward_of
from zoft.trainer.protocol import HoldsObjects
from zoft.weights.tensors import Weights


def make_ready(trainer: HoldsObjects, identity: RunIdentity) -> None:
    """Prepare a model before its first forward, of a query or of an evaluation.

    Args:
        trainer: of the model.
        identity: of the run; it takes note of the tensors that are not trained.
    """
    model, radius = trainer.model, trainer.method.estimator.radius
    # configs get the tokenizer's special tokens here, and not when training begins: an evaluation may come first
    align(model, trainer.processing_class)
    count_by_mask(model)
    # the loss of an objective is a mean already: the Trainer's token count is not for it
    if trainer.zo_objective is not None:
        trainer.model_accepts_loss_kwargs = False
        # before a run begins in its folder; rows that come one by one are not looked at
        for rows in (trainer.train_dataset, trainer.eval_dataset):
            if hasattr(rows, "__len__") and not isinstance(rows, dict) and len(rows):
                require_rows(trainer.zo_objective, [rows[0]], trainer.data_collator)
    if has_trained_scales(model):
        trainer.method.check_scales()
    if is_quantized(model):
        identity.frozen_fingerprint()  # the first forward stores the same numbers otherwise
    if radius:
        Weights(model).check_eps(radius)


class QueryForward:
    """Calls the model in queries.

    Three things may be left out of a forward: the head at positions that the loss is not read from, repeated rows that
    are packed into one, and the blocks below the lowest trained one. What a model allows is found out before the
    queries of a step, which must all be alike.

    Args:
        trainer: whose model is queried.
        has_own_loss: whether the Trainer computes a loss of its own from the model's outputs, as TRL's do.
    """

    def __init__(self, trainer: HoldsObjects, *, has_own_loss: bool) -> None:
        self.trainer = trainer
        self.has_own_loss = has_own_loss
        self.is_of_trl = any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)
        self.is_querying = False  # what is computed now is a query of a step, and no evaluation
        self.frozen_prefix: FrozenPrefix | None = None
        self.narrow_layer: nn.Module | None = None  # computed only where the loss looks
        self._has_tried_sizes = False

    @contextmanager
    def querying(self) -> Iterator[None]:
        """Evaluation mode (no dropout), and the frozen prefix reused."""
        model, self.is_querying = self.trainer.model_wrapped, True
        model.eval()
        if self.is_of_trl:
            model.training = True  # TRL decides by the root's flag alone whether a loss is logged as training
        try:
            with self.reusing_prefix():
                yield
        finally:
            self.is_querying = False

    # ---- what is left out --------------------------------------------------------------------------------------------

    def as_called(self, model: nn.Module) -> Callable[..., Any]:
        """The model as the Trainer's own loss should call it: in a query, for the labelled positions alone."""
        # an evaluation may read the logits of all positions; a query reads its loss alone
        return functools.partial(own_loss, model) if self.is_querying and self._loss_is_enough() else model

    def of_objective(self, model: nn.Module, inputs: Inputs, return_outputs: bool, *, of_each: bool) -> Any:
        """The objective's loss of a micro-batch; that of each example, or predictions too, where they are asked for."""
        objective = self.trainer.zo_objective
        if return_outputs:
            loss, predictions, _ = objective.predict(model, self.as_served(inputs))
            return loss, {"logits": predictions}
        # What is written parts sooner or later: no waiting for others, and nothing of a step's first query reused.
        with sequential() if objective.generates else nullcontext():
            if of_each:
                return objective.losses(model, {name: value for name, value in inputs.items() if name != "packed"})
            return objective.loss(model, self.as_served(inputs))

    def _loss_is_enough(self) -> bool:
        """Whether the model's own loss is all that is read of its outputs."""
        trainer = self.trainer
        return not self.has_own_loss and trainer.compute_loss_func is None and trainer.label_smoother is None

    def as_served(self, inputs: Inputs) -> Inputs:
        """The batch without packed rows where they are not used: kept hidden states are those of separate rows."""
        packed, prefix = inputs.get("packed"), self.frozen_prefix
        # states of the frozen prefix belong to separate rows: packed ones would be computed whole
        keeps_states = prefix is not None and prefix.usable
        if packed is None or (not keeps_states and serves(self.trainer.model_wrapped, packed)):
            return inputs
        return {key: value for key, value in inputs.items() if key != "packed"}

    def probe(self, batch: StepBatch) -> None:
        """Probe which computation of this model's forward can be left out on rows like these."""
        trainer = self.trainer
        model = trainer.model_wrapped
        if trainer.stages.stage is not None:  # this process has a part of the model: all was tried while it was whole
            return
        for inputs in batch.micro_batches:
            # as a query computes: the trial's numbers must be those of queries
            with torch.inference_mode(), trainer.compute_loss_context_manager():
                if trainer.zo_objective is not None:
                    trainer.zo_objective.probe(model, self.as_served(inputs))
                elif self._loss_is_enough():
                    is_counted = trainer.model_accepts_loss_kwargs and batch.num_items is not None
                    arguments = {**inputs, "num_items_in_batch": batch.num_items} if is_counted else inputs
                    # known by the way in which the class is called: a count may change what it computes
                    if not is_known(model, arguments):
                        own_loss(model, **arguments)

    def probe_sizes(self) -> None:
        """Probe once with a row of every size in the run, so that findings do not depend on where a process began.

        A resumed run has not seen the batches, and has not made the evaluations, that the run before it has.
        """
        trainer = self.trainer
        if self._has_tried_sizes or trainer.zo_objective is None:
            return
        self._has_tried_sizes = True
        evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        # rows of every kind that the run may come to: for training, evaluation and results
        datasets = [trainer.train_dataset, *evaluated.values(), *trainer.held_out.values()]
        for row in one_of_each_size(row for rows in datasets if hasattr(rows, "__len__") for row in rows):
            self.probe(StepBatch([trainer.collated([row])]))

    def narrow(self) -> None:
        """Find the part of the last block that is computed where the loss looks, where that is asked for."""
        if self.trainer.args.narrow_last_block:
            self.narrow_layer = feed_forward_of(self.trainer.model, self.trainer.method.subspace)

    def check_narrow(self, batch: StepBatch) -> None:
        """The first batch's loss is computed with the last block whole, too; a run that is resumed checks again."""
        if self.narrow_layer is None:
            return
        trainer = self.trainer
        # the model as it is called in queries, alone and without finding out anything else on the way
        with torch.no_grad(), trainer.compute_loss_context_manager(), sequential(), no_trials():
            check_narrow(functools.partial(trainer.compute_loss, trainer.model_wrapped, batch.micro_batches[0]))

    # ---- the blocks below the lowest trained one ---------------------------------------------------------------------

    def keep_prefix(self, weights: Weights) -> None:
        """Find what lies below the trained weights, anew when ``model_init`` has made another model."""
        trainer = self.trainer
        # compiled code does not see replaced forwards
        if not trainer.args.keep_frozen_prefix or trainer.args.torch_compile:
            return
        if trainer.zo_objective is not None and trainer.zo_objective.generates:  # with a cache: no call has whole rows
            return
        # another model (of model_init): states of the last one are of no use
        if self.frozen_prefix is None or self.frozen_prefix.model is not trainer.model:
            self.frozen_prefix = FrozenPrefix.of(trainer.model, weights, trainer.args.frozen_prefix_mb)

    @contextmanager
    def reusing_prefix(self) -> Iterator[None]:
        """Forwards begin at the lowest trained block, wherever that is exact, and end where the loss looks."""
        prefix = nullcontext() if self.frozen_prefix is None else self.frozen_prefix.reused()
        with prefix, nullcontext() if self.narrow_layer is None else narrowed(self.narrow_layer):
            yield

    def fill_prefix(self, *datasets: Sequence[Any], group: int = 16) -> Iterator[int]:
        """Compute the hidden states below the lowest trained block for whole datasets ahead of time.

        Rows of equal length go through together, in an order that depends on the data alone, so the kept states are
        the same bits in a resumed run. Yields the number of rows done so far; nothing where there is nothing to keep.

        Args:
            *datasets: rows that the collator takes.
            group: rows computed together.
        """
        trainer = self.trainer
        if self.frozen_prefix is None or trainer.zo_objective is None:
            return
        by_length: dict[int, list[Any]] = {}
        for row in (row for rows in datasets for row in rows):
            # padded to no length but their own: rows of equal length need no padding beside each other
            by_length.setdefault(trainer.data_collator([row])["input_ids"].shape[1], []).append(row)
        num_done = 0
        trainer.model.eval()
        # short rows first, in the order of the data: the same groups in every session
        for rows in (by_length[length] for length in sorted(by_length)):
            for start in range(0, len(rows), group):
                chunk = rows[start : start + group]
                with torch.no_grad(), trainer.compute_loss_context_manager(), no_trials():  # one call, of this batch
                    self.frozen_prefix.fill(
                        functools.partial(trainer.compute_loss, trainer.model, trainer.collated(chunk))
                    )
                num_done += len(chunk)
                yield num_done
