"""What a guard has done to a run is part of its state: any later death or longer budget ends equal to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.faults.damage import digest, trainer
from tests.faults.steps import BACK, Faulty
from zoft.journal import file as journal

JUMPS = {14: 50.0, 19: 80.0}


class Dies(TrainerCallback):
    """At the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


def guarded(folder: Path, guard: str, jumps: dict[int, float], steps: int = 30, save: int = 6) -> Faulty:
    """A run some of whose losses jump; its optimizer is made before it knows its journal, as `zoft train` does."""
    one = trainer(
        folder, Faulty, max_steps=steps, guard=guard, guard_steps=10, **BACK[guard], logging_steps=1, save_steps=save
    )
    one.factors = dict(jumps)
    one.create_optimizer()
    go_back = one.journal.go_back

    def over(back: Any, model: Any) -> None:
        one.factors = {step: factor for step, factor in one.factors.items() if step > one.progress.steps}
        go_back(back, model)

    one.journal.go_back = over
    return one


def end(folder: Path, guard: str, jumps: dict[int, float], deaths: list[int], **given: Any) -> Faulty:
    """The run, resumed after every death."""
    for number, step in enumerate([*deaths, 10**6]):
        one = guarded(folder, guard, jumps, **given)
        one.add_callback(Dies(step))
        if number:
            done = journal.read(folder / journal.NAME).end
            one.factors = {at: factor for at, factor in jumps.items() if at >= done}
        try:
            one.train(resume_from_checkpoint=True if number else None)
        except InterruptedError:
            continue
        return one
    raise AssertionError


@pytest.mark.parametrize("save", [6, 100], ids=["checkpoints", "journal alone"])
def test_fault_15_a_halved_rate_outlives_every_death(save: int, tmp_path: Path):
    whole = end(tmp_path / "whole", "rollback", JUMPS, [], save=save)
    contents = journal.read(tmp_path / "whole" / journal.NAME)
    assert [note["lr_factor"] for note in contents.notes] == [0.5, 0.5]
    assert [record.lr for record in contents.records[-10:]] == [2.5e-4] * 10
    one = end(tmp_path / "run", "rollback", JUMPS, [21, 25], save=save)
    assert digest(one) == digest(whole)
    assert _guarded_of(one) == _guarded_of(whole) == 2


def test_fault_15_a_second_return_behind_the_first_keeps_both(tmp_path: Path):
    one = guarded(tmp_path, "rollback", {14: 50.0}, save=100)
    one.args.guard_back = 2
    first = one.journal.go_back

    def again(back: Any, model: Any) -> None:
        first(back, model)
        one.factors, one.args.guard_back = {13: 50.0}, 12
        one.journal.go_back = first

    one.journal.go_back = again
    one.train()
    contents = journal.read(tmp_path / journal.NAME)
    assert [note["lr_factor"] for note in contents.notes] == [0.5, 0.5]
    assert [record.lr for record in contents.records] == [1e-3] + [2.5e-4] * 29


@pytest.mark.parametrize("save", [6, 100], ids=["checkpoints", "journal alone"])
def test_fault_15_a_clipped_step_is_remembered_alike_live_and_replayed(save: int, tmp_path: Path):
    whole = end(tmp_path / "whole", "clip", JUMPS, [], save=save)
    one = end(tmp_path / "run", "clip", JUMPS, [16, 21], save=save)
    assert digest(one) == digest(whole)
    assert one.progress.recent == whole.progress.recent
    assert _guarded_of(one) == _guarded_of(whole) == 2


def test_fault_15_guarded_steps_are_counted_right_after_a_resume(tmp_path: Path):
    one = end(tmp_path, "clip", JUMPS, [16], save=100)
    logged = {line["step"]: line["num_guarded_steps"] for line in one.state.log_history if "num_guarded_steps" in line}
    assert [logged[step] for step in (14, 15, 17, 19, 20)] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("save", [6, 100], ids=["checkpoints", "journal alone"])
def test_fault_15_a_finished_run_goes_on_as_a_longer_one(save: int, tmp_path: Path):
    jumps = {14: 50.0, 27: 80.0}
    whole = end(tmp_path / "whole", "clip", jumps, [], save=save)
    end(tmp_path / "run", "clip", jumps, [], save=save, steps=20)
    assert len(journal.read(tmp_path / "run" / journal.NAME).records) == 20
    if save == 100:  # the Trainer saves at the end of a run, whatever it is told
        shutil.rmtree(tmp_path / "run" / "checkpoint-20")
    longer = guarded(tmp_path / "run", "clip", jumps, save=save)
    longer.train(resume_from_checkpoint=True)
    assert digest(longer) == digest(whole)
    assert _guarded_of(longer) == _guarded_of(whole) == 2


def test_fault_15_a_return_into_sealed_steps_keeps_those_before_it(tmp_path: Path):
    end(tmp_path, "rollback", {}, [], steps=20, save=100)
    one = guarded(tmp_path, "rollback", {21: 50.0}, save=100)
    one.train(resume_from_checkpoint=True)
    contents = journal.read(tmp_path / journal.NAME)
    assert [record.step for record in contents.records] == list(range(30))
    assert [record.lr for record in contents.records] == [1e-3] * 17 + [5e-4] * 13


def _guarded_of(one: Faulty) -> int:
    return [line["num_guarded_steps"] for line in one.state.log_history if "num_guarded_steps" in line][-1]
