"""A run by engine=offload is the run by engine=layerwise: weights, evaluations, checkpoints and journal."""

from __future__ import annotations

import pytest
import torch

from tests.models import batch_for, tiny_llama
from zoft import ZOConfig, ZOTrainer
from zoft.diagnostics.callback import DiagnosticsCallback
from zoft.engines.offload import Offload
from zoft.errors import UserError
from zoft.weights.mapped import is_mapped
from zoft.weights.tensors import Weights


def trainer_in(folder, engine, *, dtype=torch.float32, **given):
    model = tiny_llama().to(dtype)
    batch = batch_for(model, rows=16, length=7)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(16)]
    args = {"max_steps": 6, "save_steps": 3, "eval_steps": 2, "eval_strategy": "steps", "journal_hash_steps": 4}
    args |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2}
    config = ZOConfig(output_dir=str(folder), per_device_train_batch_size=4, seed=5, **(args | given))
    return ZOTrainer(model=model, args=config, train_dataset=rows, eval_dataset=rows[:8], engine=engine)


def outcome_of(trainer):
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return Weights(trainer.model).digest(), evaluations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_its_evaluations_and_its_resumed_half_are_those_of_the_resident_one(tmp_path, dtype):
    outcomes = []
    for engine in ("layerwise", Offload(folder=str(tmp_path))):
        name = engine if isinstance(engine, str) else engine.name()
        whole = trainer_in(tmp_path / name, engine, dtype=dtype)
        whole.train()
        half = trainer_in(tmp_path / f"{name}-half", engine, dtype=dtype, max_steps=3)
        half.train()
        rest = trainer_in(tmp_path / f"{name}-half", engine, dtype=dtype)
        rest.train(resume_from_checkpoint=True)
        assert outcome_of(rest)[0] == outcome_of(whole)[0]
        outcomes.append(outcome_of(whole))
    assert outcomes[0] == outcomes[1]
    assert is_mapped(whole.model.model.layers[0].mlp.up_proj.weight.data, to_write=True)
    reloaded = type(whole.model).from_pretrained(tmp_path / "offload" / "checkpoint-6", dtype=dtype)
    assert Weights(reloaded).digest() == outcomes[1][0]


def test_an_evaluation_before_training_brings_blocks_too(tmp_path):
    """Beside a GPU they are not on the device yet, and on a CPU the whole file would be read into memory."""
    wanted = trainer_in(tmp_path / "layerwise", "layerwise").evaluate()["eval_loss"]
    trainer = trainer_in(tmp_path / "offload", Offload("file"))
    assert trainer.evaluate()["eval_loss"] == wanted
    assert trainer.zo_optimizer.session.transfer.counts["up"] >= 3
    trainer.train()
    whole = trainer_in(tmp_path / "again", "layerwise")
    whole.train()
    assert outcome_of(trainer)[0] == outcome_of(whole)[0]


def test_diagnostics_are_refused_before_training(tmp_path):
    trainer = trainer_in(tmp_path, "offload")
    trainer.add_callback(DiagnosticsCallback())
    with pytest.raises(UserError, match="engine=offload has two blocks of it at hand"):
        trainer.train()
