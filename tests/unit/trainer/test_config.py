"""Arguments that are not zoft's own: what is refused, switched off, converted; each said once."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from zoft.errors import UserError
from zoft.trainer.config import ZOConfig, as_zo_config, zo_config


@dataclass
class Checkpointing(TrainingArguments):
    """As TRL's: checkpointing is its default."""

    gradient_checkpointing: bool = True
    learning_rate: float = 2e-5


def make_args(cls: type, folder: Path, **given: Any) -> Any:
    return cls(output_dir=str(folder / "out"), report_to=[], use_cpu=True, **given)


@pytest.mark.parametrize("cls", [Seq2SeqTrainingArguments, Checkpointing, TrainingArguments])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neftune_noise_alpha", 5.0),
        ("optim", "sgd"),
        ("adam_beta1", 0.1),
        ("torch_empty_cache_steps", 3),
        ("fsdp_config", {"min_num_params": 1}),
        ("resume_from_checkpoint", "there"),
    ],
)
def test_meaningless_settings_of_any_arguments_are_refused(cls: type, name: str, value: Any, tmp_path: Path):
    with pytest.raises(UserError, match=f"^{name}=.* cannot be used with zeroth-order training"):
        as_zo_config(make_args(cls, tmp_path, **{name: value}), "x")


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "per_device_eval_batch_size"])
def test_numbers_are_checked_in_any_arguments(name: str, tmp_path: Path):
    for cls in (Seq2SeqTrainingArguments, ZOConfig):
        with pytest.raises(UserError, match=f"^{name} must be at least 1, got 0"):
            as_zo_config(make_args(cls, tmp_path, **{name: 0}), "x")


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_rate_uphill_or_of_no_number_is_refused(name: str, value: float, tmp_path: Path):
    with pytest.raises(UserError, match=f"^{name} must be at least 0, got {value}"):
        make_args(ZOConfig, tmp_path, **{name: value})


def test_a_class_keeps_its_own_defaults_with_zofts_fields(tmp_path: Path):
    """KTOConfig's order of rows became transformers' random one, which KTOTrainer refuses."""

    @dataclass
    class Own(Checkpointing):
        train_sampling_strategy: str = "sequential"
        logging_steps: float = 10
        label_names: list[str] | None = dataclasses.field(default_factory=lambda: ["labels"])

    args = make_args(zo_config(Own), tmp_path, budget_queries=8)
    assert (args.train_sampling_strategy, args.logging_steps, args.label_names) == ("sequential", 10, ["labels"])
    assert (args.learning_rate, args.max_grad_norm, args.gradient_checkpointing) == (1e-6, 0.0, False)
    assert make_args(zo_config(Own), tmp_path, logging_steps=3).logging_steps == 3


def test_a_loss_scaler_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no gradient to scale: load the model in float16 .* or give bf16=True"):
        make_args(ZOConfig, tmp_path, fp16=True)


def test_what_is_switched_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = make_args(Checkpointing, tmp_path)
    with caplog.at_level(logging.WARNING, logger="zoft.trainer.config"):
        taken = as_zo_config(args, "x")
    assert type(taken) is Checkpointing
    assert (taken.gradient_checkpointing, taken.max_grad_norm, taken.learning_rate) == (False, 0.0, 2e-5)
    assert "gradient_checkpointing is switched off" in caplog.text
    assert "max_grad_norm=1.0, the default, is switched off" in caplog.text
    assert (args.gradient_checkpointing, args.max_grad_norm) == (True, 1.0)  # the user's own stay


def test_conversion_of_plain_arguments_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="zoft.trainer.config"):
        as_zo_config(make_args(TrainingArguments, tmp_path, learning_rate=1e-3), "x")
    assert [record.getMessage() for record in caplog.records] == [
        "TrainingArguments left at their defaults are zoft's here: lr_scheduler_type=constant, max_grad_norm=0.0 "
        "(ZOConfig has these, and node directions a rate of their own)"
    ]


def test_settings_of_zoft_are_said_nothing_about(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    args = make_args(ZOConfig, tmp_path)
    assert as_zo_config(args, "x") is args
    assert not caplog.records
    assert dataclasses.is_dataclass(args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": None}, "learning_rate must be at least 0, and a finite number, got None"),
        ({"learning_rate": float("inf")}, "learning_rate must be at least 0, and a finite number, got inf"),
        ({"weight_decay": None}, "weight_decay must be at least 0, and a finite number, got None"),
        ({"num_train_epochs": None}, "num_train_epochs must be at least 0, and a finite number, got None"),
        ({"max_steps": 2.5}, "max_steps must be at least -1, and a whole number, got 2.5"),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps must be at least 1, and a whole number"),
        ({"budget_queries": "40"}, "budget.queries must be at least 1, and a whole number, got '40'"),
        ({"guard": "clip", "guard_steps": None}, "guard_steps must be at least 1, and a whole number, got None"),
        ({"logging_steps": None}, "logging_steps must be a whole number of steps from 1 on"),
        ({"seed": None}, "seed must be 0 or more"),
    ],
)
def test_what_is_no_number_is_refused_when_it_is_given(given: dict[str, Any], message: str, tmp_path: Path):
    """learning_rate=None was a TypeError, and inf ended the run after its first step."""
    with pytest.raises(UserError, match=message):
        make_args(ZOConfig, tmp_path, **given)
    fine = {"learning_rate": numpy.float64(0.1), "budget_queries": numpy.int64(8), "save_total_limit": None}
    assert make_args(ZOConfig, tmp_path, **fine).learning_rate == 0.1


def test_a_message_of_the_command_line_has_the_names_of_python_in_a_note():
    """A traceback shows notes; the command line prints the sentence alone."""
    error = UserError("budget.queries=4 is little: set trainer.eval_steps=2, trainable=all, or call trainer.train()")
    assert error.__notes__ == [
        "In Python: budget.queries is budget_queries, trainer.eval_steps is eval_steps, trainable= is requires_grad"
    ]
    assert not hasattr(UserError("estimator.eps must be > 0"), "__notes__")


def test_arguments_of_a_made_class_can_be_pickled_and_copied(tmp_path: Path):
    args = make_args(zo_config(Checkpointing), tmp_path, budget_queries=8)
    for other in (pickle.loads(pickle.dumps(args)), copy.copy(args), copy.deepcopy(args)):
        assert type(other) is type(args) is zo_config(Checkpointing)
        assert other.to_dict() == args.to_dict()
