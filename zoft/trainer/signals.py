"""Signals: finish the step, save, stop; Ctrl-C leaves with 130, SIGTERM and SIGUSR1 with the code for requeueing.

A second signal leaves at once. So does a step that takes longer than a scheduler waits: the journal has every step
before it, so nothing but that step is lost.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.errors import Requeued
from zoft.report.text import say

PATIENCE = 3.0
"""Seconds that a step may still take after SIGTERM or SIGUSR1."""

_LARGEST = 1 << 30  # bytes of a model that is saved before leaving for a requeue; a larger one has its journal
_REQUEUE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopOnInterrupt(TrainerCallback):
    """Turns the first signal into a clean stop at the end of the step.

    The step is short of nothing then: weights, counters, schedule and data position belong together, so the checkpoint
    that is written resumes to the run that was never stopped.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.heard: int | None = None  # the signal
        self._before: dict[int, Any] = {}

    @property
    def requeue(self) -> bool:
        """Whether a scheduler asked for the stop, and will start the same command again."""
        return self.stopped and self.heard != signal.SIGINT

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, *_REQUEUE)}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        """Ask for a checkpoint and the end, in every process after the same step."""
        heard = self.heard or 0
        if args.world_size > 1:
            # What was heard is read before the exchange: a signal that comes while waiting in it counts next step.
            loudest = torch.tensor(float(heard), device=args.device)
            torch.distributed.all_reduce(loudest, op=torch.distributed.ReduceOp.MAX)
            heard = int(loudest)
        self.stopped = heard > 0
        if self.stopped:
            self.heard = heard
            _set_alarm(0)
            size = sum(p.numel() * p.element_size() for p in model.parameters()) if model is not None else 0
            control.should_save = self.heard == signal.SIGINT or size <= _LARGEST
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop listening."""
        self.close()

    def close(self) -> None:
        """Put the earlier signal handlers back."""
        _set_alarm(0)
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _heard(self, number: int, _frame: FrameType | None) -> None:
        if self.heard is not None:
            self._leave(number)
        self.heard = number
        if number == signal.SIGINT:
            say("stopping after this step; Ctrl-C again leaves at once")
        else:
            say(f"{signal.Signals(number).name}: stopping after this step, to be started again")
            self._before.setdefault(_ALARM, signal.signal(_ALARM, lambda *_: self._leave(number)))
            _set_alarm(PATIENCE)

    def _leave(self, number: int) -> None:
        self.close()
        raise KeyboardInterrupt if number == signal.SIGINT else Requeued


_ALARM = getattr(signal, "SIGALRM", signal.SIGINT)


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
