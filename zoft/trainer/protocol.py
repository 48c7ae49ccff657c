"""The part of the Trainer that its objects read, under Hugging Face's own names, as a typing protocol.

They hold the trainer itself where a subclass may replace what they call (``compute_loss``, ``save_model``), and where
the Trainer puts another object in an attribute's place while they live (``model``, ``state``, ``lr_scheduler``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from zoft.step.method import Method
from zoft.step.update import ZOOptimizer
from zoft.trainer.batch import Inputs
from zoft.trainer.grid import Grid


class HoldsObjects(Protocol):
    """A Trainer with :class:`zoft.trainer.trainer.ZOMixin` in front."""

    args: Any
    model: Any
    model_wrapped: nn.Module  # the model as the Trainer's loop calls it
    model_accepts_loss_kwargs: bool  # it divides its loss by the token count it is given
    compute_loss: Callable[..., Any]  # (model, micro-batch, ...) -> its loss
    compute_loss_func: Any  # a loss of the user's own, which is given that count too
    compute_metrics: Any
    label_smoother: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    processing_class: Any
    accelerator: Any
    callback_handler: Any
    lr_scheduler: Any
    state: TrainerState
    control: TrainerControl
    is_distributed_loading_by_transformers: bool
    # and of the mixin
    method: Method
    zo_objective: Any  # the component that replaces the model's own loss, or None
    mezo_protocol: bool
    direction_seeds: list[int] | None
    held_out: dict[str, Any]
    grid: Grid
    engine: Any
    stages: Any  # zoft.trainer.stages.Stages, which holds the trainer
    step_loss: Any
    query_forward: Any
    journal: Any
    gather_function: Any

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The optimizer underneath accelerate's wrapper."""

    def settle_weights(self) -> None:
        """All weights are where they can be read."""

    def collated(self, rows: Sequence[Any]) -> Inputs:
        """One batch of these rows, on the device."""

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Autocast, where the arguments ask for it."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, or the adapter."""

    def get_train_dataloader(self) -> Any:
        """The loader of the training rows."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay."""

    def _load_best_model(self) -> None:
        """Take the weights of ``state.best_model_checkpoint``."""

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labels that count in these micro-batches."""
