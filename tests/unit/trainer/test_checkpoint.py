"""Checkpoints of models whose classes save tensors under other names than they hold them."""

from __future__ import annotations

import pytest
import torch

from tests import models
from zoft import ZOConfig, ZOTrainer


def trained(folder, family, steps, resume=None, **more):
    model = getattr(models, family)()
    batch = models.batch_for(model, rows=8, length=7)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = ZOConfig(
        output_dir=str(folder), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=3,
        logging_strategy="no", per_device_train_batch_size=4, dataloader_pin_memory=False,
        **{"learning_rate": 1e-2} | more,
    )  # fmt: skip
    trainer = ZOTrainer(model, args, train_dataset=rows, eval_dataset=rows, estimator="central")
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("family", ["tiny_mixtral", "tiny_qwen3_moe", "tiny_qwen"])
def test_a_run_goes_on_from_the_weights_that_it_had(tmp_path, family):
    """A mixture's class splits its experts into files' own names, by which the Trainer finds none of them again."""
    _, whole = trained(tmp_path / "whole", family, 6)
    _, before = trained(tmp_path / "parted", family, 3)
    (tmp_path / "parted" / "journal.zo").unlink(missing_ok=True)
    _, resumed = trained(tmp_path / "parted", family, 6, resume=str(tmp_path / "parted" / "checkpoint-3"))
    assert not all(torch.equal(before[name], tensor) for name, tensor in whole.items())
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    is_renamed = family != "tiny_qwen"
    assert (tmp_path / "whole" / "checkpoint-3" / "trained.safetensors").is_file() is is_renamed  # and twice only there


def test_the_best_checkpoint_is_put_back(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    ruinous = {"lr_scheduler_type": "constant", "learning_rate": 3.0}
    trainer, tensors = trained(tmp_path, "tiny_mixtral", 9, **best, **ruinous)
    step = trainer.state.best_global_step
    assert step < 9
    _, wanted = trained(tmp_path / "again", "tiny_mixtral", step, **ruinous)
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name


def test_models_alone_are_passed_over_and_the_journal_has_every_step(tmp_path):
    given = {"save_only_model": True, "lr_scheduler_type": "constant"}
    _, whole = trained(tmp_path / "whole", "tiny_llama", 6, **given)
    trained(tmp_path / "parted", "tiny_llama", 4, **given)
    _, resumed = trained(tmp_path / "parted", "tiny_llama", 6, resume=True, **given)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
