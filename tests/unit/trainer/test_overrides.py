"""What the trainer overrides has the signature that the installed transformers calls."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers import Trainer

from zoft import ZOTrainer
from zoft.trainer.trainer import ZOMixin

OURS = [cls for cls in ZOMixin.__mro__ if cls.__module__.startswith("zoft.")]
OVERRIDES = sorted(
    {name for cls in OURS for name, value in vars(cls).items() if callable(value) and hasattr(Trainer, name)}
    - {"__init__", "__doc__", "__module__"}
)


def takes(method: Any, name: str, parameter: inspect.Parameter) -> bool:
    """Whether a method can be called with this parameter of the one that it overrides."""
    own = inspect.signature(method).parameters
    kinds = {p.kind for p in own.values()}
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return parameter.kind in kinds
    return name in own or inspect.Parameter.VAR_KEYWORD in kinds


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_takes_what_the_trainer_passes(name: str):
    method, theirs = getattr(ZOTrainer, name), inspect.signature(getattr(Trainer, name)).parameters
    missing = [each for each, parameter in theirs.items() if not takes(method, each, parameter)]
    assert not missing, f"{name} does not take {missing}"
    named = [each for each in theirs if each in inspect.signature(method).parameters]
    assert [each for each in inspect.signature(method).parameters if each in named] == named, "another order"


def test_there_are_overrides_to_look_at():
    some = {"train", "training_step", "compute_loss", "create_optimizer", "_save_checkpoint", "evaluate"}
    assert some <= set(OVERRIDES)
