"""Ctrl-C: the step is finished, a checkpoint written, and the resumed run is the run that was never stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl

from tests import models
from zoft import ZOConfig, ZOTrainer
from zoft.trainer.signals import StopOnInterrupt
from zoft.weights.tensors import Weights


class Interrupted(ZOTrainer):
    """Sends itself signals in the middle of a step, between two queries."""

    at_step = -1
    signals = 1

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = 0
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.asked += 1
        if self.progress.steps == self.at_step and self.asked == 1:
            for _ in range(self.signals):
                os.kill(os.getpid(), signal.SIGINT)
        return loss


def trainer(folder: Path, *, at_step: int = -1, signals: int = 1, **given: Any) -> Interrupted:
    args = ZOConfig(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        save_strategy="no",
        logging_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = models.tiny_llama()
    batch = models.batch_for(model, rows=10)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(10)]
    zo_trainer = Interrupted(model, args, train_dataset=rows, callbacks=[StopOnInterrupt()], **given)
    zo_trainer.at_step, zo_trainer.signals = at_step, signals
    return zo_trainer


def digest(zo_trainer: ZOTrainer) -> str:
    return Weights(zo_trainer.model).digest()


@pytest.mark.parametrize("at_step", [0, 3, 4, 7])  # the first, one within an epoch, its last, the run's last
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_stopped_and_resumed_is_never_stopped(at_step: int, optimizer: str, tmp_path: Path):
    whole = trainer(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    handler = signal.getsignal(signal.SIGINT)
    stopped = trainer(tmp_path / "a", at_step=at_step, optimizer=optimizer)
    stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert stopped.state.global_step == at_step + 1
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == [f"checkpoint-{at_step + 1}"]
    torch.manual_seed(at_step)
    resumed = trainer(tmp_path / "a", optimizer=optimizer)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert digest(resumed) == digest(whole)
    log_rows = [
        [(line["step"], line["loss"], line["learning_rate"], line["num_queries"]) for line in history if "loss" in line]
        for history in (whole.state.log_history, resumed.state.log_history)
    ]
    assert len(log_rows[0]) == 2
    assert log_rows[1] == log_rows[0]  # the mean over steps before and after the stop, too


@pytest.mark.parametrize("engine", ["layerwise", "in_place"])
def test_a_second_signal_leaves_at_once_with_clean_weights(engine: str, tmp_path: Path):
    zo_trainer = trainer(tmp_path / "a", at_step=0, signals=2, engine=engine)
    before = digest(zo_trainer)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        zo_trainer.train()
    assert digest(zo_trainer) == before
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_closing_gives_the_signal_back():
    handler = signal.getsignal(signal.SIGINT)
    callback = StopOnInterrupt()
    callback.on_train_begin(None, None, None)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) != handler
    callback.close()
    callback.close()
    assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_leave_signals_alone():
    import threading

    handler = signal.getsignal(signal.SIGINT)
    callback = StopOnInterrupt()
    thread = threading.Thread(target=callback.on_train_begin, args=(None, None, None))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_during_the_exchange_counts_at_the_next_step(monkeypatch: pytest.MonkeyPatch):
    """With several processes: what is heard while waiting for the others must not be overwritten by their answer."""
    callback, control = StopOnInterrupt(), TrainerControl()
    args = SimpleNamespace(world_size=2, device="cpu")

    def exchange(flag: torch.Tensor, op: Any) -> None:
        del flag, op
        if not callback.heard:
            callback._heard(signal.SIGINT, None)

    monkeypatch.setattr(torch.distributed, "all_reduce", exchange)
    callback.on_step_end(args, None, control)  # type: ignore[arg-type]
    assert not control.should_training_stop  # the other process does not know yet
    callback.on_step_end(args, None, control)  # type: ignore[arg-type]
    assert control.should_training_stop
    assert control.should_save
    assert callback.stopped
