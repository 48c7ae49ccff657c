"""A trainer's stage of a pipeline: cut once, and gathered where all stages are needed together.

Where the processes are no pipeline everything here is as in one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device

from zoft.engines._cut import check_stages
from zoft.engines._stage import Pipeline, Stage
from zoft.engines._survey import is_compiled
from zoft.engines.base import Engine
from zoft.errors import UserError
from zoft.journal.fingerprint import know_base
from zoft.lm.logits.support import no_trials
from zoft.lm.models.quantized import is_quantized
from zoft.subspaces.base import num_moving
from zoft.trainer.batch import Inputs, StepBatch
from zoft.trainer.protocol import HoldsObjects
from zoft.weights.tensors import Weights

_OF_TENSORS = ("state", "masters", "history", "sums")
"""What an optimizer's state has by tensor."""


class Stages:
    """This process's stage.

    Attributes:
        stage: once it is taken.
    """

    def __init__(self, trainer: HoldsObjects) -> None:
        self.trainer = trainer
        self.stage: Stage | None = None
        self._decayed: frozenset[str] = frozenset()  # names of all tensors that decay
        self._check_model()

    @property
    def is_pipeline(self) -> bool:
        """Whether the processes are one."""
        return bool(self.trainer.args.parallel == "pipeline" and self.trainer.args.world_size > 1)

    def _check_model(self) -> None:
        """Refuse a model that cannot be cut.

        Raises:
            UserError: in every process.
        """
        model = self.trainer.model
        if not self.is_pipeline:
            return
        given = getattr(self.trainer, "model_init", None)
        if model is None or given is not None or is_quantized(model) or is_compiled(model):
            raise UserError(
                "trainer.parallel=pipeline cuts a model of plain tensors that is there when the trainer is made: give "
                "one that is neither quantised nor compiled, and no model_init"
            )
        check_stages(model, self.trainer.grid.world.count)

    def take(self) -> Engine:
        """The engine of this process's stage, cut at the first call; the run's engine where there is no pipeline."""
        asked: Engine = self.trainer.engine
        if not self.is_pipeline:
            return asked
        self._cut()
        assert self.stage is not None
        loss = self.trainer.step_loss
        return Pipeline(self.stage, loss.parts, loss.joined, getattr(asked, "piece_mb", 0))

    def _cut(self) -> None:
        """Find out all that is found out by calling the whole model, then keep this process's part."""
        trainer, model, grid = self.trainer, self.trainer.model, self.trainer.grid
        if self.stage is not None:
            return
        self.share_weights()
        know_base(model, str(trainer.journal.identity.frozen_fingerprint()))
        self._decayed = frozenset(trainer.get_decay_parameter_names(model))
        model.eval()
        rows = self._first_rows()
        trainer.query_forward.probe_sizes()
        trainer.query_forward.probe(rows)
        trainer.query_forward.probe(StepBatch(rows.micro_batches))  # where its loss makes no use of the count

        def forward() -> Any:
            device = next(iter(model.parameters())).device
            inputs = send_to_device(rows.micro_batches[0], device)
            with no_trials(), trainer.query_forward.querying(), trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, inputs, num_items_in_batch=rows.num_items)

        trainer.gather_function = trainer.accelerator.gather_for_metrics = functools.partial(
            _already_gathered, trainer.accelerator
        )
        self.stage = Stage(model, grid.world.rank, grid.world.count, trainer.args.device, forward, grid.gather)
        grid.stage = self.stage
        # from here on the loss comes out in the last process alone; whoever asks for it outside of a step needs it too
        trainer.compute_loss = functools.partial(self.everywhere, trainer.compute_loss)

    def _first_rows(self) -> StepBatch:
        if self.trainer.train_dataset is None:
            raise UserError("trainer.parallel=pipeline finds out by training rows what a stage needs: give some")
        loader = self.trainer.get_train_dataloader()
        inputs = loader.collate_fn([loader.dataset[index] for index in range(min(2, len(loader.dataset)))])
        return StepBatch([inputs], self.trainer._get_num_items_in_batch([inputs], self.trainer.args.device))

    def share_weights(self) -> None:
        """All processes start from the weights of the first one, as long as each has the whole model."""
        self.trainer.settle_weights()
        if self.stage is None:
            self.trainer.grid.world.share_weights(self.trainer.model)

    # ---- the whole model ---------------------------------------------------------------------------------------------

    def whole(self) -> AbstractContextManager[None]:
        """Within this block the first process has the whole model: all come here."""
        return nullcontext() if self.stage is None else self.stage.held.whole()

    def refilled(self) -> AbstractContextManager[None]:
        """Within this block every process has memory for the whole model, to read a checkpoint into it."""
        return nullcontext() if self.stage is None else self.stage.held.refilled()

    def digest(self) -> str:
        """The hash of all trained weights: all processes come here."""
        return Weights(self.trainer.model).digest() if self.stage is None else self.stage.held.digest()

    @property
    def num_trained(self) -> int:
        """How many numbers the run's directions move, in all processes."""
        if self.stage is not None:
            return self.stage.held.num_trained
        return num_moving(self.trainer.zo_optimizer.subspace)

    # ---- the model is called outside of a step -----------------------------------------------------------------------

    def everywhere(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The result, in every process, of a call that calls the model once."""
        if self.stage is None or self.stage.is_running:
            return call(*args, **kwargs)
        with no_trials():
            return self.stage.everywhere(functools.partial(call, *args, **kwargs))

    def placed(self, inputs: Inputs) -> Inputs:
        """Rows, where the model is: on the CPU as long as it is whole."""
        if not self.is_pipeline or self.stage is not None:
            return inputs
        return dict(send_to_device(inputs, "cpu"))

    # ---- the optimizer's state ---------------------------------------------------------------------------------------

    def gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with the tensors of all processes, in the first one: all come here."""
        if self.stage is None:
            return state
        groups = zip(self._kinds(Weights(self.trainer.model).tensors), state["param_groups"], strict=True)
        tensors: dict[str, Any] = {key: state[key] for key in _OF_TENSORS} | {"groups": dict(groups)}
        first = self.stage.rank == 0
        everyone: list[Any] | None = [None] * self.stage.count if first else None
        torch.distributed.gather_object(tensors, everyone, 0)
        if everyone is None:
            return state
        for other in reversed(everyone):  # of what several hold, the first one's
            tensors = {key: {**tensors[key], **other[key]} for key in tensors}
        of_kind = tensors.pop("groups")
        return state | tensors | {"param_groups": [of_kind[kind] for kind in sorted(of_kind, reverse=True)]}

    def share_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part of a whole optimizer's state that concerns this process's tensors."""
        if self.stage is None:
            return state
        names = Weights(self.trainer.model).tensors
        tensors = {key: {n: value for n, value in state.get(key, {}).items() if n in names} for key in _OF_TENSORS}
        of_kind = dict(zip(self._kinds(self.stage.held.trained), state["param_groups"], strict=True))
        return state | tensors | {"param_groups": [of_kind[kind] for kind in self._kinds(names)]}

    def _kinds(self, names: Iterable[str]) -> list[bool]:
        """Whether tensors decay, of each group of an optimizer over these: those that do come first."""
        return sorted({name in self._decayed for name in names}, reverse=True)


def _already_gathered(accelerator: Any, results: Any, use_gather_object: bool = False) -> Any:
    """Results of an evaluation's batch, which every process has: as accelerate gathers them in one process."""
    accelerator.gather = lambda value: value
    try:
        return type(accelerator).gather_for_metrics(accelerator, results, use_gather_object)
    finally:
        del accelerator.gather
