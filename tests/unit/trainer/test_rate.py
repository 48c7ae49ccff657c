"""A learning rate that is chosen before the first step: of short trainings, and not ruined by a longer one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from tests.models import tiny_llama
from zoft import UserError, ZOConfig, ZOTrainer
from zoft.trainer import rate

ROWS = [{"input_ids": [5 + n, 6 + n, 7, 8], "labels": [5 + n, 6 + n, 7, 8]} for n in range(16)]


def trainer(tmp_path: Any, budget: int = 200, **given: Any) -> ZOTrainer:
    args = ZOConfig(
        output_dir=str(tmp_path), learning_rate="auto", budget_queries=budget, report_to=[], use_cpu=True, seed=3,
        per_device_train_batch_size=8, disable_tqdm=True, save_strategy="no", logging_steps=1000,
    )  # fmt: skip
    return ZOTrainer(model=tiny_llama(), args=args, train_dataset=ROWS, **given)


def test_a_rate_that_ruins_a_longer_training_is_lowered():
    assert rate.held(1.0, 0.5, lambda at: {1.0: math.inf, 0.25: 0.6}.get(at, 0.5)) == 1 / 16
    assert rate.held(1.0, 0.5, lambda at: 0.52) == 1.0
    assert rate.held(1.0, -0.5, lambda at: -0.48) == 1.0
    assert rate.held(1.0, 0.5, lambda at: None) == 0.25  # nothing is known of a longer one


def test_a_trainer_chooses_counts_and_trains(tmp_path: Any):
    zo_trainer = trainer(tmp_path, estimator="central", optimizer="adam")
    before = {name: tensor.clone() for name, tensor in zo_trainer.model.state_dict().items()}
    seen: list[Any] = []
    begin = zo_trainer.journal.begin
    zo_trainer.journal.begin = lambda resume: (  # type: ignore[method-assign]
        seen.append({name: tensor.clone() for name, tensor in zo_trainer.model.state_dict().items()}), begin(resume)
    )[1]  # fmt: skip
    zo_trainer.train()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in before.items()), "trials leave nothing behind"
    choice = json.loads((tmp_path / rate.NAME).read_text())
    assert 0 < choice["queries"] <= 50
    assert any("4 times as long" in name for name in choice["trials"])
    assert zo_trainer.args.learning_rate == choice["values"]["optimizer.learning_rate"]
    assert zo_trainer.progress.num_queries <= 200
    assert zo_trainer.progress.num_queries - choice["queries"] == 2 * zo_trainer.args.max_steps
    again = trainer(tmp_path, estimator="central", optimizer="adam")
    again.train(resume_from_checkpoint=True)
    assert again.args.learning_rate == zo_trainer.args.learning_rate
    assert again.args.max_steps == zo_trainer.args.max_steps
    assert json.loads((tmp_path / rate.NAME).read_text()) == choice


def test_what_cannot_be_searched_is_said(tmp_path: Any):
    with pytest.raises(UserError, match=r"budget\.queries=8 is too few"):
        trainer(tmp_path, budget=8, estimator="central").train()
    with pytest.raises(UserError, match="learning_rate must be a number or \"auto\", got 'much'"):
        ZOConfig(output_dir=str(tmp_path), learning_rate="much")
    zo_trainer = trainer(tmp_path, estimator="central")
    zo_trainer.args.budget_queries = None
    with pytest.raises(UserError, match="give a budget"):
        zo_trainer.train()
