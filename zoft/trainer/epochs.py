"""Steps of whole micro-batches where a pass over the data ends before a step does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_utils import has_length

from zoft.errors import UserError

_Base: Any = Trainer if TYPE_CHECKING else object  # at run time the Trainer comes from the class beside the mixin


class WholeSteps(_Base):
    """The part of :class:`zoft.trainer.ZOMixin` that knows which micro-batches make a step.

    Of rows without a known number (``IterableDataset``) the Trainer hands over whatever is left at the end of a pass as
    if it were a step, takes no step with it, and divides the next one by the tokens of its own micro-batches alone.
    Here what is left waits for the first micro-batches of the next pass: every step has as many as it is asked for.
    """

    _micro_batches: list[Any]  # micro-batches of the step that have been collected (zoft.trainer)
    _waiting: list[Any]  # micro-batches that are left of a pass
    _loader: Any = None  # the loader of the pass
    _stream: Iterator[Any]  # and where it stands
    _pass = 0  # its number
    _passes_before = 0  # passes that the Trainer's loop does not know of: before a resume, or short ones
    _num_steps_in_pass = 0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """As the Trainer's own: ``num_batches`` micro-batches, or none."""
        samples = self._waiting
        if not self._num_steps_in_pass:
            self._stream = epoch_iterator
        came = self._fetch(num_batches)
        if not came and not self._num_steps_in_pass:
            self._refuse_empty_pass()
        # A pass that is shorter than a step: a pass without any step would end the run.
        while came and len(samples) < num_batches and not self._num_steps_in_pass:
            self._stream = self._next_pass()
            came = self._fetch(num_batches)
        if len(samples) < num_batches:
            return [], None
        self._waiting = []
        self._num_steps_in_pass += 1
        return samples, self._get_num_items_in_batch(samples, device)

    def _fetch(self, num_batches: int) -> int:
        """Take micro-batches from the stream until ``num_batches`` wait; returns how many came."""
        before = len(self._waiting)
        while len(self._waiting) < num_batches:
            try:
                batch = next(self._stream, None)
            except ValueError as error:
                if "does not contain any data" not in str(error):  # what accelerate says of a stream without rows
                    raise
                batch = None
            if batch is None:
                break
            self._waiting.append(batch)
        return len(self._waiting) - before

    def _refuse_training_rows(self) -> None:
        """No rows, or a stream that is to drop what fills no batch: the Trainer passes that setting over."""
        rows = self.train_dataset
        if self.args.dataloader_drop_last and isinstance(rows, IterableDataset):
            raise UserError(
                "dataloader_drop_last=true is not for a stream (IterableDataset), whose loader keeps the rows that "
                "fill no batch: give a stream of whole batches, or set it to false"
            )
        if has_length(rows) and not len(rows):
            raise UserError("there are no training rows: train_dataset is empty")

    def _refuse_no_batch(self, loader: Any) -> None:
        """Rows that are dropped because they fill no batch, all of them."""
        if self.args.dataloader_drop_last and has_length(loader) and not len(loader):
            raise UserError(
                f"trainer.dataloader_drop_last=true leaves nothing of {len(self.train_dataset)} training rows, "
                "which are less than one batch: lower trainer.per_device_train_batch_size, or set it to false"
            )

    def _refuse_empty_pass(self) -> None:
        """The loop would take it for the end of the run, and say that all went well."""
        raise UserError(
            f"pass {self._pass + 1} over the training rows found none: "
            + (
                "train_dataset gives its rows only once: make a new iterator in its __iter__, or ask for fewer steps"
                if self._pass
                else "train_dataset is empty"
            )
        )

    def _next_pass(self) -> Iterator[Any]:
        self._pass += 1
        self._passes_before += 1
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self._pass)
        return iter(self._loader)

    def _run_pass(self, **given: Any) -> None:
        """The Trainer's own pass over the data, from where the run stands."""
        self._micro_batches, self._num_steps_in_pass = [], 0  # a callback may have ended a pass in the middle of a step
        self._loader = given["train_dataloader"]
        resumed = given["resume_from_checkpoint"] is not None and given["epoch"] == given["epochs_trained"]
        skipped = given["steps_trained_in_current_epoch"]
        if resumed and skipped and not has_length(self._loader) and not self.args.ignore_data_skip:
            given["train_dataloader"] = self._skip(skipped)
            given["steps_trained_in_current_epoch"] = 0
        for name in ("epoch", "epochs_trained"):
            given[name] += self._passes_before
        self._pass = given["epoch"]
        super()._run_epoch(**given)

    def _skip(self, num_batches: int) -> Any:
        """The loader behind its first ``num_batches`` micro-batches, which may lie several passes back."""
        while True:
            if hasattr(self._loader, "set_epoch"):
                self._loader.set_epoch(self._passes_before)
            batches, came = iter(self._loader), 0
            for batch in batches:
                if came == num_batches:
                    return _Once(itertools.chain([batch], batches))
                came += 1
            if not came:
                return _Once(batches)
            num_batches -= came
            self._passes_before += 1


class _Once:
    """A loader that goes on where its iterator stands; without ``set_epoch``: that would be another pass."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches
