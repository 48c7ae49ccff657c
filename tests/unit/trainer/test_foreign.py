"""Classes with the mixin in them, and what a trainer is given for a part or a loss that is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import transformers

from tests.models import tiny_opt
from zoft import UserError, ZOConfig, ZOMixin, ZOTrainer
from zoft.estimators.central import Central
from zoft.lm.data.encoding import PairCollator
from zoft.optimizers.sgd import SGD

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(8)]


def args(folder: Any, **given: Any) -> ZOConfig:
    return ZOConfig(output_dir=str(folder), budget_queries=4, report_to=[], use_cpu=True, **given)


def test_a_trainer_in_front_of_the_mixin_is_refused():
    """It trained by backpropagation, and nothing was said."""
    with pytest.raises(UserError, match=r"^class Behind: put ZOMixin in front of Trainer"):
        type("Behind", (transformers.Trainer, ZOMixin), {})
    type("Front", (type("Mine", (ZOMixin,), {}), transformers.Trainer), {})


def test_the_mixin_alone_is_no_trainer(tmp_path: Any):
    with pytest.raises(UserError, match="ZOMixin is half of a class"):
        ZOMixin(model=tiny_opt(), args=args(tmp_path))


@dataclass
class Wide(Central):
    """A part of one's own."""

    eps: float = 1e-2


class Undecorated(Central):
    eps: float = 1e-2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": Wide}, r"estimator= takes a part, not its class: give Wide\(\), with its settings"),
        ({"estimator": Undecorated()}, "estimator=: put @dataclass above class Undecorated"),
        ({"estimator": SGD()}, r"estimator= takes a part that inherits from Estimator, got SGD\("),
        ({"optimizer": torch.optim.SGD}, "optimizer= takes a part, not its class"),
        (
            {"peft_config": {"r": 2}},
            r"peft_config takes a config of peft's, e.g. peft.LoraConfig\(r=8\), got \{'r': 2\}",
        ),
    ],
)
def test_what_is_no_part_is_a_sentence(given: dict[str, Any], message: str, tmp_path: Any):
    with pytest.raises(UserError, match=message):
        ZOTrainer(model=tiny_opt(), args=args(tmp_path), train_dataset=ROWS, **given)


class Own(ZOTrainer):
    """A loss of the test's own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = self.make(outputs.logits[:, -1].max(-1).values)
        return (loss, outputs) if return_outputs else loss


NUMBERS = {
    "tensor": lambda values: values.mean(),
    "one element": lambda values: values.mean().view(1),
    "float": lambda values: float(values.mean()),
    "numpy": lambda values: numpy.float32(values.mean()),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_loss_is_any_number_in_training_and_evaluation(kind: str, tmp_path: Any):
    """docs/python.md: anything that gives a number. A float was an AttributeError."""
    found = []
    for each in ("tensor", kind):
        trainer = Own(model=tiny_opt(), args=args(tmp_path / each, learning_rate=1e-2), train_dataset=ROWS)
        trainer.make = NUMBERS[each]
        trainer.train()
        found.append(trainer.evaluate(ROWS)["eval_loss"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda values: values, r"must return one number, got a tensor of shape \[8\]: take its mean\(\)"),
        (lambda values: None, "must return a number, got NoneType"),
        (lambda values: {"loss": values}, "must return a number, got dict"),
    ],
)
def test_a_loss_that_is_no_number_is_a_sentence(make: Any, message: str, tmp_path: Any):
    trainer = Own(model=tiny_opt(), args=args(tmp_path), train_dataset=ROWS)
    trainer.make = make
    with pytest.raises(UserError, match=f"compute_loss {message}"):
        trainer.train()


@pytest.mark.parametrize("objective", ["options", "reward", "metric", "preference", "classes", "label_words"])
def test_rows_that_an_objective_is_not_computed_from_are_refused_before_a_run_begins(objective: str, tmp_path: Any):
    """A KeyError: 'option_len' in the first step, and the folder was taken."""
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=rf"objective={objective} is computed from .*encode_rows.*collator_for"):
        ZOTrainer(model=tiny_opt(), args=args(folder), train_dataset=ROWS, objective=objective, estimator="central")
    assert not (folder / "journal.bin").exists()


def test_a_collator_of_other_rows_is_named(tmp_path: Any):
    given: dict[str, Any] = {"train_dataset": ROWS, "data_collator": PairCollator(0), "estimator": "central"}
    with pytest.raises(UserError, match=r"data_collator=PairCollator does not take these rows \(KeyError: 'chosen'\)"):
        ZOTrainer(model=tiny_opt(), args=args(tmp_path), objective="preference", **given)
