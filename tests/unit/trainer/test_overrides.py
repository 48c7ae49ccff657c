"""What the trainer overrides stands in one place, is short, and takes what the installed transformers passes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import pytest
from transformers import Trainer

from zoft import ZOTrainer
from zoft.trainer.trainer import ZOMixin

OVERRIDES = sorted(name for name, value in vars(ZOMixin).items() if inspect.isfunction(value) and name in vars(Trainer))
EMPTY = inspect.Parameter.empty
MOST_STATEMENTS = 10
"""Of a method, without its docstring; `__init__` makes the parts and has more."""


def takes(method: Any, name: str, parameter: inspect.Parameter) -> bool:
    """Whether a method can be called with this parameter of the one that it overrides."""
    parameters = inspect.signature(method).parameters
    kinds = {p.kind for p in parameters.values()}
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return parameter.kind in kinds
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def named_parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of an override that have names, without self."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(vars(ZOMixin)[name]).parameters
    return {each: p for each, p in parameters.items() if p.kind not in variable and each != "self"}


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name != "__init__"])
def test_an_override_takes_what_the_trainer_passes(name: str):
    method, theirs = getattr(ZOTrainer, name), inspect.signature(getattr(Trainer, name)).parameters
    missing = [each for each, parameter in theirs.items() if not takes(method, each, parameter)]
    assert not missing, f"{name} does not take {missing}"
    named = [each for each in theirs if each in inspect.signature(method).parameters]
    assert [each for each in inspect.signature(method).parameters if each in named] == named, "another order"


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name != "__init__"])
def test_what_an_override_names_the_trainer_has_too(name: str):
    """Nothing may be asked of the Trainer's loop that it does not give, and what it leaves out is the same."""
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    for each, parameter in named_parameters(name).items():
        assert each in theirs, f"{name} names {each}, and the Trainer passes no such thing"
        by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        if parameter.kind is by_place:
            assert list(named_parameters(name)).index(each) == [p for p in theirs if p != "self"].index(each), (
                f"{name}: {each}"
            )
        if theirs[each].default is not EMPTY:
            assert parameter.default == theirs[each].default, f"{name} has another default for {each}"


def test_all_overrides_stand_together():
    """In the mixin itself: no other class of ours is between it and the Trainer, and none puts itself in front."""
    assert ZOMixin.__bases__ == (object,)
    assert set(vars(ZOTrainer)) <= {"__module__", "__doc__", "__annotations__"}
    some = {"train", "training_step", "compute_loss", "create_optimizer", "_save_checkpoint", "evaluate", "_run_epoch"}
    assert some <= set(OVERRIDES)


@pytest.mark.parametrize("name", [name for name in OVERRIDES if name != "__init__"])
def test_an_override_is_a_few_lines(name: str):
    """What it does is in the objects that the trainer holds."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(vars(ZOMixin)[name]))).body
    statements = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 2  # itself, and its docstring
    assert statements <= MOST_STATEMENTS, f"{name} has {statements} statements"


def test_what_it_holds_is_no_name_of_the_trainers():
    """An attribute of transformers' or TRL's own under the same name would be overwritten."""
    source = inspect.getsource(inspect.getmodule(Trainer))  # type: ignore[arg-type]
    for name in ("processes", "journal", "checkpoints", "step_loss", "query_forward", "run_steps", "passes"):
        assert f"self.{name} " not in source, name
        assert not hasattr(Trainer, name), name
