"""Steps of whole micro-batches where a pass over the data ends before a step does; rows that cannot be trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from zoft.errors import UserError


@dataclass
class Passes:
    """Passes over the training rows, and the micro-batches that make a step.

    Of rows without a known number (``IterableDataset``) the Trainer hands over whatever is left at the end of a pass as
    if it were a step, takes no step with it, and divides the next one by the tokens of its own micro-batches alone.
    Here what is left waits for the first micro-batches of the next pass: every step has as many as it is asked for.

    Args:
        skips: whether a resumed run goes to where it was in the data.
    """

    skips: bool = True
    _waiting: list[Any] = field(default_factory=list)  # left of a pass
    _loader: Any = None  # of the pass
    _stream: Iterator[Any] = field(default_factory=lambda: iter(()))  # where it stands
    _number: int = 0  # of the pass
    _before: int = 0  # passes that the Trainer's loop does not know of: before a resume, or short ones
    _num_steps: int = 0  # of the pass

    def next_samples(self, stream: Iterator[Any], num_batches: int) -> list[Any]:
        """The micro-batches of the next step; none at the end of a pass."""
        # the first step of a pass brings the pass's own stream
        if not self._num_steps:
            self._stream = stream
        num_new = self._fetch(num_batches)
        if not num_new and not self._num_steps:
            self._refuse_empty()
        # A pass that is shorter than a step: a pass without any step would end the run.
        # a pass that is shorter than a step goes on with the next one, within the step
        while num_new and len(self._waiting) < num_batches and not self._num_steps:
            self._stream = self._next_pass()
            num_new = self._fetch(num_batches)
        if len(self._waiting) < num_batches:
            # the rest of a pass waits for the next one's first micro-batches
            return []
        samples, self._waiting = self._waiting, []
        self._num_steps += 1
        return samples

    def _fetch(self, num_batches: int) -> int:
        """Take micro-batches from the stream until ``num_batches`` wait; returns how many came."""
        num_before = len(self._waiting)
        # no more than are lacking: what is taken from a stream cannot be put back
        try:
            self._waiting += itertools.islice(self._stream, max(0, num_batches - num_before))
        except ValueError as error:
            if "does not contain any data" not in str(error):  # what accelerate says of a stream without rows
                raise
        return len(self._waiting) - num_before

    def _refuse_empty(self) -> None:
        """Refuse a pass without rows, which the loop would take for the successful end of the run."""
        again = "train_dataset gives its rows only once: make a new iterator in its __iter__, or ask for fewer steps"
        why = again if self._number else "train_dataset is empty"
        raise UserError(f"pass {self._number + 1} over the training rows found none: {why}")

    def _next_pass(self) -> Iterator[Any]:
        # the number seeds the order of the rows: it counts passes the loop does not know of
        self._number += 1
        self._before += 1
        _set_epoch(self._loader, self._number)
        return iter(self._loader)

    def begin(self, given: dict[str, Any]) -> dict[str, Any]:
        """Begin a pass: the arguments of the Trainer's ``_run_epoch``, from where the run stands."""
        given = dict(given)
        self._num_steps = 0
        self._loader = given["train_dataloader"]
        # resumed in this pass: the loop counts its steps from there
        is_resumed = given["resume_from_checkpoint"] is not None and given["epoch"] == given["epochs_trained"]
        num_skipped = given["steps_trained_in_current_epoch"]
        # a stream has no length, so the Trainer cannot skip in it by number
        if is_resumed and num_skipped and self.skips and not has_length(self._loader):
            given["train_dataloader"] = self._behind(num_skipped)
            given["steps_trained_in_current_epoch"] = 0
        for name in ("epoch", "epochs_trained"):
            given[name] += self._before
        self._number = given["epoch"]
        return given

    def _behind(self, num_batches: int) -> Any:
        """The loader behind its first ``num_batches`` micro-batches, which may lie several passes back."""
        # pass by pass: a step may have begun in the pass before
        for batches in self._passes():
            num_skipped = sum(1 for _ in itertools.islice(batches, num_batches))
            rest = list(itertools.islice(batches, 1))
            if rest or not num_skipped:  # not at the end of this pass; or rows that never come
                return _Once(itertools.chain(rest, batches))
            num_batches -= num_skipped
            self._before += 1
        raise AssertionError("there is always another pass")

    def _passes(self) -> Iterator[Iterator[Any]]:
        """Iterators of pass after pass, from the one that the run stands in."""
        for _ in itertools.count():
            _set_epoch(self._loader, self._before)
            yield iter(self._loader)


def _set_epoch(loader: Any, number: int) -> None:
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(number)


class _Once:
    """A loader that goes on where its iterator stands; without ``set_epoch``: that would be another pass."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def refuse_training_rows(args: Any, rows: Any) -> None:
    """Refuse an empty data set, and ``dataloader_drop_last`` for a stream, which the Trainer would ignore."""
    if args.dataloader_drop_last and isinstance(rows, IterableDataset):
        raise UserError(
            "dataloader_drop_last=true is not for a stream (IterableDataset), whose loader keeps the rows that "
            "fill no batch: give a stream of whole batches, or set it to false"
        )
    if has_length(rows) and not len(rows):
        raise UserError("there are no training rows: train_dataset is empty")


def refuse_no_batch(args: Any, loader: Any, rows: Any) -> None:
    """Refuse rows that are all dropped because they fill no batch."""
    if args.dataloader_drop_last and has_length(loader) and not len(loader):
        raise UserError(
            f"trainer.dataloader_drop_last=true leaves nothing of {len(rows)} training rows, "
            "which are less than one batch: lower trainer.per_device_train_batch_size, or set it to false"
        )
