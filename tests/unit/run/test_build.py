"""What the Trainer would refuse in its own words is refused in ours, with what to set instead."""

from __future__ import annotations

import pytest

from zoft.config import compose
from zoft.errors import UserError
from zoft.run.build import arguments_of


@pytest.mark.parametrize("strategies", [{"save": "no"}, {"save": "epoch"}, {"save": "steps", "eval": "no"}])
def test_the_best_checkpoint_is_one_that_is_saved_when_it_is_judged(strategies: dict[str, str]):
    words = [f"trainer.{verb}_strategy={value}" for verb, value in strategies.items()]
    cfg = compose(["config=classify", "task.train=rows.csv", *words])
    with pytest.raises(UserError, match=r"set trainer\.load_best_model_at_end=false"):
        arguments_of(cfg)


def test_a_refusal_of_transformers_is_shown_whole():
    cfg = compose(["config=classify", "task.train=rows.csv", "trainer.save_steps=7", "trainer.eval_steps=5"])
    with pytest.raises(UserError, match=r"multiple.*5"):
        arguments_of(cfg)
