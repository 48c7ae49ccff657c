"""Ctrl-C: finish the step, save a checkpoint, stop; a second one leaves at once, with the weights restored."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.report.terminal import say


class StopOnInterrupt(TrainerCallback):
    """Turns the first SIGINT into a clean stop at the end of the step.

    The step is short of nothing then: weights, counters, schedule and data position belong together, so the checkpoint
    that is written resumes to the run that was never stopped.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.heard = False
        self._before: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._heard)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint and the end, in every process after the same step."""
        if args.world_size > 1:
            # What was heard is read before the exchange: a signal that comes while waiting in it counts next step.
            anybody = torch.tensor(float(self.heard), device=args.device)
            torch.distributed.all_reduce(anybody, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(anybody)
        else:
            self.stopped = self.heard
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop listening."""
        self.close()

    def close(self) -> None:
        """Give the signal back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _heard(self, _signal: int, _frame: FrameType | None) -> None:
        if self.heard:
            self.close()
            raise KeyboardInterrupt
        self.heard = True
        say("stopping after this step; Ctrl-C again leaves at once")
