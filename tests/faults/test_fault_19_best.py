"""The best checkpoint: the one that was measured, whole, found where its folder is now, or a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.faults import damage
from zoft.errors import UserError
from zoft.journal import snapshot

BEST = 8


def _trainer(folder: Path, scores: dict[int, float] | None = None, **given: Any) -> Any:
    """A run whose evaluations (every fourth step) find what the test wants, best at step 8."""
    score_at = scores or {4: 0.5, 8: 0.9, 12: 0.4, 16: 0.3}
    trainers: list[Any] = []

    def metrics(_: Any) -> dict[str, float]:
        return {"score": score_at[trainers[0].state.global_step]}

    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    data = damage.trainer(folder, rows=8).train_dataset
    trainers.append(damage.trainer(folder, eval_dataset=data, compute_metrics=metrics, **settings | given))
    return trainers[0]


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the weights after eight steps."""
    one = damage.trainer(tmp_path_factory.mktemp("best"), max_steps=BEST)
    one.train()
    return damage.digest(one)


def test_fault_19_the_best_is_loaded(best: str, tmp_path: Path):
    one = _trainer(tmp_path / "run")
    one.train()
    assert damage.digest(one) == best


def test_fault_19_a_damaged_best_is_refused_and_the_last_can_be_had(tmp_path: Path):
    _trainer(tmp_path / "run", max_steps=12).train()
    file = tmp_path / "run" / f"checkpoint-{BEST}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"best checkpoint.*model.safetensors is not what was written.*at_end=false"):
        _trainer(tmp_path / "run", max_steps=16).train(resume_from_checkpoint=True)
    _trainer(tmp_path / "run", max_steps=16, load_best_model_at_end=False).train(resume_from_checkpoint=True)


def test_fault_19_damaged_while_the_run_goes_on(tmp_path: Path):
    one = _trainer(tmp_path / "run")
    file = tmp_path / "run" / f"checkpoint-{BEST}" / "model.safetensors"

    class Damage(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 10:
                file.write_bytes(file.read_bytes()[:-1] + b"\0\0")

    one.add_callback(Damage())
    with pytest.raises(UserError, match=r"best checkpoint"):
        one.train()


def test_fault_19_a_best_that_is_gone_is_refused(tmp_path: Path):
    _trainer(tmp_path / "run", max_steps=12).train()
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{BEST}")
    with pytest.raises(UserError, match=r"best checkpoint.*checkpoint-8 is missing"):
        _trainer(tmp_path / "run", max_steps=16).train(resume_from_checkpoint=True)


def test_fault_19_a_best_that_moved_with_its_folder_is_loaded_and_kept(best: str, tmp_path: Path):
    _trainer(tmp_path / "run", max_steps=12).train()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    one = _trainer(tmp_path / "moved", max_steps=16, save_total_limit=1)
    one.train(resume_from_checkpoint=True)
    assert damage.digest(one) == best
    assert (tmp_path / "moved" / f"checkpoint-{BEST}").is_dir()


def test_fault_19_a_best_between_two_saves_is_saved(tmp_path: Path, best: str):
    one = _trainer(tmp_path / "run", save_steps=12)
    one.train()
    assert damage.digest(one) == best


def test_fault_25_save_total_limit_goes_by_step(tmp_path: Path):
    import os

    one = damage.trainer(tmp_path / "run", max_steps=8)
    one.train()
    for step, time in ((4, 2_000_000_000), (8, 1_000_000_000)):  # as a copy or a restored backup leaves them
        os.utime(tmp_path / "run" / f"checkpoint-{step}", (time, time))
    (tmp_path / "run" / "checkpoint-4.mine").mkdir()
    damage.trainer(tmp_path / "run", save_total_limit=2).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in snapshot.checkpoints(tmp_path / "run")) == ["checkpoint-12", "checkpoint-8"]
    assert (tmp_path / "run" / "checkpoint-4.mine").is_dir()
