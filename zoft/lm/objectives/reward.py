"""A function of your own that judges what the model writes."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.lm.metrics.libraries import number_of
from zoft.lm.objectives._written import Writing
from zoft.lm.objectives.base import Batch
from zoft.utils import own_files
from zoft.utils.lazy import Tensor, nn, torch

Function = Callable[..., Sequence[float]]


@dataclass
class Reward(Writing):
    """Minus the mean reward of generated texts; the reward is any Python function and needs no gradient.

    ``function(prompts, generations)`` gets two lists of texts and returns a number for each, also numpy's or torch's;
    True is 1 and False 0. Where it also takes ``answers``, it gets what the rows hold to judge by: the reward column of
    your own data, or a task's gold answers. ``zoft.lm.rewards:countdown`` is an example.

    The name of a function is code to run: it is taken from the command line or from Python, never from a file.

    Args:
        function: ``module:function``, where a module of the working directory is found too, or ``FILE.py:function``.
    """

    function: str = ""

    def check(self) -> None:
        """Refuse what names no function."""
        super().check()
        module, _, name = self.function.partition(":") if isinstance(self.function, str) else ("", "", "")
        parts = [*module.split("."), name]
        fine = callable(self.function) or not self.function or all(part.isidentifier() for part in parts)
        self.require(fine or own_files.split(self.function) is not None, "function", "module:function")

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows whose answers the model writes."""
        return ("rated", "generate")

    def prepare(self) -> None:
        """The function has to be there."""
        self.loaded()

    def own_code(self) -> dict[str, str]:
        """The function's file, where it is named by one."""
        named = own_files.split(self.function)
        file = Path(named[0]).expanduser() if named else None
        own = {f"{file.name}:{named[1]}": own_files.digest(str(file))} if named and file and file.is_file() else {}
        return super().own_code() | own

    def loaded(self) -> Function:
        """The function, imported.

        Raises:
            UserError: none is given, or there is none of that name, or it does not take prompts and generations.
        """
        if callable(self.function):
            return self.function
        if not self.function:
            raise UserError(
                "objective=reward needs objective.function=module:function, which takes prompts and generations, e.g. "
                "objective.function=zoft.lm.rewards:countdown"
            )
        return _loaded(self.function)

    def rewards(self, prompts: list[str], texts: list[str], answers: list[Any]) -> list[float]:
        """What the function says of each text, checked.

        Raises:
            UserError: not one finite number for each text.
        """
        function = self.loaded()
        more = {"answers": answers} if _takes_answers(function) else {}
        found = list(function(prompts=prompts, generations=texts, **more))
        name = self.function if isinstance(self.function, str) else getattr(function, "__name__", "the reward")
        if len(found) != len(texts):
            raise UserError(f"{name} must return a number for each of {len(texts)} generations, got {len(found)}")
        numbers = []
        for value in found:
            number = number_of(value)
            if number is None or not math.isfinite(number):
                raise UserError(f"{name} must return finite numbers, got {value!r}")
            numbers.append(number)
        return numbers

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(minus the mean reward, each prompt's reward [B], zeros [B] in place of labels)."""
        rewards = -torch.stack([self.losses_of(texts, batch) for texts in self.texts(model, batch)]).mean(0)
        return -rewards.mean(), rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    def losses_of(self, texts: list[str], batch: Batch) -> Tensor:
        """Minus each text's reward, [B]."""
        answers = [own[0] if len(own) == 1 else own for own in batch["answers"]]
        return -torch.tensor(self.rewards(batch["prompts"], texts, answers), device=batch["input_ids"].device)


@lru_cache
def _loaded(path: str) -> Function:
    module_name, _, name = path.rpartition(":")
    if own_files.split(path) is not None:
        module, _ = own_files.module_of(module_name, f"objective.function={path}")
        return _checked(getattr(module, name, None), path, name)
    sys.path.insert(0, os.getcwd())  # the `zoft` command does not look there by itself
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise UserError(f"objective.function={path}: {error}; give module:function that Python can import") from error
    finally:
        sys.path.remove(os.getcwd())
    return _checked(found, path, name)


def _checked(found: Any, path: str, name: str) -> Function:
    """The function, which must take prompts and generations."""
    if not callable(found):
        raise UserError(f"objective.function={path}: the module has no function called {name}")
    takes = inspect.signature(found).parameters
    if not {"prompts", "generations"} <= takes.keys() and not _takes_any(found):
        raise UserError(
            f"objective.function={path} must take prompts and generations by these names, it takes "
            f"{', '.join(takes) or 'nothing'}"
        )
    function: Function = found
    return function


def _takes_any(function: Function) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _takes_answers(function: Function) -> bool:
    return "answers" in inspect.signature(function).parameters or _takes_any(function)
