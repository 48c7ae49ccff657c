"""Steps that a run must not take, or has taken already: what is said, and what the folder holds then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.faults import damage
from tests.runs import arguments, report, zoft
from zoft.config import compose
from zoft.errors import NonFiniteLossError, UserError
from zoft.estimators.central import Central
from zoft.journal import file as journal
from zoft.run.train import run


@pytest.mark.parametrize(("dtype", "rate"), [("float32", 1e38), ("bfloat16", 1e38), ("float16", 1e6)])
def test_fault_25_a_step_that_makes_weights_infinite_is_none(dtype: str, rate: float, tmp_path: Path):
    given = {"dtype": dtype, "estimator": Central(eps=1e-2)}
    damage.trainer(tmp_path / "run", max_steps=4, **given).train()
    one = damage.trainer(tmp_path / "run", learning_rate=rate, **given)
    with pytest.raises(NonFiniteLossError, match=r"step 4 has made weights infinite .*its losses were finite"):
        one.train(resume_from_checkpoint=True)
    assert journal.read(tmp_path / "run" / journal.NAME).end == 4
    again = damage.trainer(tmp_path / "run", **given)
    again.train(resume_from_checkpoint=True)
    whole = damage.trainer(tmp_path / "whole", **given)
    whole.train()
    assert damage.digest(again) == damage.digest(whole)
    assert damage.weights_are_finite(again)


@pytest.mark.parametrize("with_journal", [True, False])
def test_fault_25_a_run_does_not_end_before_what_it_has_done(with_journal: bool, tmp_path: Path):
    damage.trainer(tmp_path / "run", max_steps=8, journal=with_journal).train()
    with pytest.raises(UserError, match=r"has done 8 steps, and is to end after 6: give .*max_steps=8"):
        damage.trainer(tmp_path / "run", max_steps=6, journal=with_journal).train(resume_from_checkpoint=True)
    one = damage.trainer(tmp_path / "run", max_steps=8, journal=with_journal)
    one.train(resume_from_checkpoint=True)
    assert one.state.global_step == 8


def test_fault_25_replay_is_the_model_whatever_became_of_the_budget(tmp_path: Path):
    """Killed in step 10 of 12, then asked to end after 5: refused with the budget that ends it where it is."""

    class Dies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(compose(arguments(tmp_path, tmp_path / "out")), [Dies()])
    less = zoft("train", *arguments(tmp_path, "out", "budget.queries=10"), cwd=tmp_path)
    assert less.returncode == 2
    assert "has done 9 steps, and is to end after 5: give budget.queries=18" in less.stderr
    ended = zoft("train", *arguments(tmp_path, "out", "budget.queries=18"), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    replayed = zoft("replay", "out", cwd=tmp_path)
    assert report(tmp_path / "out")["weights_sha256"] in replayed.stdout
