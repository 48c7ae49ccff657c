"""The mixin on a Trainer that is not ours: TRL's SFTTrainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.runs import tiny_tokenizer
from zoft.weights.tensors import Weights

trl = pytest.importorskip("trl")


def sft(tmp_path: Path, cls: Any = None, **given: Any) -> Any:
    from datasets import Dataset

    from zoft.trainer.trainer import ZOMixin

    class ZOSFT(ZOMixin, trl.SFTTrainer):
        pass

    fields = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "max_length": 16,
    }
    args = trl.SFTConfig(**(fields | given.pop("fields", {})))
    texts = ["win a free prize", "meet you later home", "claim it is free", "lunch is later you call"] * 2
    data = Dataset.from_list([{"text": text} for text in texts])
    return (cls or ZOSFT)(
        model=given.pop("model", None) or models.tiny_llama(),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        **given,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_sft_with_forward_passes_only(lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=2) if lora else None
    trainer = sft(tmp_path, peft_config=config, estimator="one_sided")
    assert not trainer.args.gradient_checkpointing
    assert trainer.args.max_grad_norm == 0.0
    assert not getattr(trainer.model, "is_gradient_checkpointing", False)
    names = Weights(trainer.model).tensors
    assert all("lora" in name for name in names) == lora
    before = Weights(trainer.model).digest()
    trainer.train()
    assert Weights(trainer.model).digest() != before
    training = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["num_queries"] for line in training] == [2, 4, 6]
    for line in training:
        assert math.isfinite(line["loss"])
        assert {"projected_grad", "eps", "mean_token_accuracy", "entropy", "num_tokens"} <= set(line)
        assert not any(key.startswith("eval_") for key in line)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    told = trainer.evaluate()
    assert math.isfinite(told["eval_loss"])
    assert "eval_mean_token_accuracy" in told


def test_the_clean_loss_is_sfts_own(tmp_path: Path):
    """Same first batch, same weights: the loss that SFTTrainer logs with backpropagation."""
    ours = sft(tmp_path, estimator="one_sided", fields={"max_steps": 1, "gradient_accumulation_steps": 2})
    ours.train()
    theirs = sft(tmp_path, trl.SFTTrainer, fields={"max_steps": 1, "gradient_accumulation_steps": 2, "data_seed": 42})
    theirs.train()
    losses = [next(line["loss"] for line in t.state.log_history if "loss" in line) for t in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_chosen_gradient_norm_is_kept(tmp_path: Path):
    assert sft(tmp_path, fields={"max_grad_norm": 0.5}).args.max_grad_norm == 0.5
