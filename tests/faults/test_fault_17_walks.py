"""Engines that come back by arithmetic leave rounding errors in the weights: a resumed run has the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.damage import digest, trainer
from tests.faults.test_fault_15_guard import Dies
from tests.runs import arguments, report, zoft
from zoft.engines.in_place import InPlace
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.estimators.per_example import PerExample
from zoft.estimators.svrg import SVRG

WALKS: dict[str, dict[str, Any]] = {
    "torch_sequential": {"estimator": Central(noise="torch_sequential", num_directions=2)},
    "subtract": {"estimator": Central(), "engine": InPlace("subtract")},
    "one_sided": {"estimator": OneSided(num_directions=2), "engine": InPlace("subtract")},
    "schedule": {"estimator": Central(eps_schedule="linear"), "engine": InPlace("subtract")},
    "per_example": {"estimator": PerExample(), "engine": InPlace("subtract")},
    "svrg": {"estimator": SVRG(), "engine": InPlace("subtract")},
    "tried steps": {"estimator": Central(), "optimizer": "conservative", "engine": InPlace("subtract")},
}


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("save", [4, 100], ids=["checkpoints", "journal alone"])
def test_fault_17_walks_resume_to_the_bit(walk: str, save: int, tmp_path: Path):
    given = {**WALKS[walk], "save_steps": save, "journal_hash_steps": 3}
    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    for number, step in enumerate((6, 9)):
        one = trainer(tmp_path / "run", callbacks=[Dies(step)], **given)
        with pytest.raises(InterruptedError):
            one.train(resume_from_checkpoint=True if number else None)
    one = trainer(tmp_path / "run", **given)
    one.train(resume_from_checkpoint=True)
    assert digest(one) == digest(whole)


def test_fault_17_mezos_own_numbers_replay_to_the_bit(tmp_path: Path):
    given = arguments(tmp_path, "out", "estimator.noise=torch_sequential")
    trained = zoft("train", *given, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    replayed = zoft("replay", "out", cwd=tmp_path)
    assert report(tmp_path / "out")["weights_sha256"] in replayed.stdout, replayed.stderr
