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
from typing import Any

from zoft.errors import UserError
from zoft.lm.metrics.libraries import number_of
from zoft.lm.objectives._grading import judges, name_of, raised
from zoft.lm.objectives._written import WrittenObjective
from zoft.lm.objectives.base import Batch
from zoft.utils import files, own_files
from zoft.utils.lazy import Tensor, nn, torch
from zoft.utils.meeting import met

Function = Callable[..., Sequence[float]]


@dataclass
class Reward(WrittenObjective):
    """Minus the mean reward of generated texts; the reward is any Python function and needs no gradient.

    ``function(prompts, generations)`` gets two lists of texts and returns a number for each, also numpy's or torch's;
    True is 1 and False 0. Where it also takes ``answers``, it gets what the rows hold to judge by: the reward column of
    your own data, or a task's gold answers. ``zoft.lm.rewards:countdown`` is an example.

    The name of a function is code to run: it is taken from the command line or from Python, never from a file.

    With ``workers`` the function is called in that many processes, once a text (lists of one): slow judges work side by
    side, on the texts of all points of a step, and one that hangs, dies or raises costs its own text: ``failed`` says
    what that counts. The run's ``ungraded.jsonl`` has each of them. Without, it is called here with all texts of a
    query together.

    Args:
        function: ``module:function``, where a module of the working directory is found too, or ``FILE.py:function``.
        workers: processes that judge; 0 judges in this one, where nothing bounds its time.
        timeout: seconds that a text may take in one of them.
        failed: what a text counts that got no number; null ends the run there, and the same command goes on.
    """

    function: str = ""
    workers: int = 0
    timeout: float = 10.0
    failed: float | None = None

    def check(self) -> None:
        """Refuse what names no function, and settings of processes that there are none of."""
        super().check()
        self.require(self.workers >= 0, "workers", "0 or more")
        self.require(0 < self.timeout < float("inf"), "timeout", "> 0 and finite")
        self.require(self.failed is None or math.isfinite(self.failed), "failed", "null or finite")
        unread = not self.workers and (self.timeout != 10.0 or self.failed is not None)
        self.require(not unread, "workers", "at least 1 with timeout or failed", "they are about its processes")
        module, _, name = self.function.partition(":") if isinstance(self.function, str) else ("", "", "")
        parts = [*module.split("."), name]
        fine = callable(self.function) or not self.function or all(part.isidentifier() for part in parts)
        self.require(fine or own_files.split(self.function) is not None, "function", "module:function")

    @property
    def forms(self) -> tuple[str, ...]:
        """Rows whose answers the model writes."""
        return ("rated", "generate")

    def prepare(self) -> None:
        """The function has to be there, for other processes too where they are to call it."""
        _checked(self.loaded(), self._name, self._name.rpartition(":")[2])
        if self.workers:
            name_of(self.function)

    def own_code(self) -> dict[str, str]:
        """The function's file, where it is named by one."""
        named = own_files.split(self.function)
        file = files.at_home(named[0]) if named else None
        digests = {f"{file.name}:{named[1]}": own_files.digest(str(file))} if named and file and file.is_file() else {}
        return super().own_code() | digests

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
        if self.workers:
            pool, jobs = judges(name_of(self.function), self.workers), list(zip(prompts, texts, answers, strict=True))
            return list(met(pool, jobs, lambda each: pool.grade(each, self.timeout, self.failed)))
        more = {"answers": answers} if takes_answers(function) else {}
        try:
            values = list(function(prompts=prompts, generations=texts, **more))
        except Exception as error:
            raise UserError(
                f"objective.function={self._name} raised {raised(error)}, given {len(texts)} texts: with "
                "objective.workers=1 objective.failed=NUMBER a text that it cannot judge counts that, and the same "
                "command goes on from the last step"
            ) from error
        name = self._name
        if len(values) != len(texts):
            raise UserError(f"{name} must return a number for each of {len(texts)} generations, got {len(values)}")
        numbers = []
        for value in values:
            number = number_of(value)
            if number is None or not math.isfinite(number):
                raise UserError(f"{name} must return finite numbers, got {value!r}")
            numbers.append(number)
        return numbers

    @property
    def _name(self) -> str:
        return self.function if isinstance(self.function, str) else getattr(self.function, "__name__", "the reward")

    def predict(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(minus the mean reward, each prompt's reward [B], zeros [B] in place of labels)."""
        rewards = -self.losses(model, batch)
        return -rewards.mean(), rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    def losses_of(self, texts: list[str], batch: Batch) -> Tensor:
        """Minus each text's reward, [B]."""
        return self.losses_of_samples([texts], batch)[0]

    def losses_of_samples(self, samples: list[list[str]], batch: Batch) -> list[Tensor]:
        """Minus each text's reward, [B] each."""
        answers = [of_row[0] if len(of_row) == 1 else of_row for of_row in batch["answers"]]
        rewards = self.rewards_of_samples(batch["prompts"], samples, answers)
        return [-torch.tensor(of_row, device=batch["input_ids"].device) for of_row in rewards]

    def rewards_of_samples(self, prompts: list[str], samples: list[list[str]], answers: list[Any]) -> list[list[float]]:
        """:meth:`rewards` of every sample; with processes, of all texts side by side."""
        if not self.workers:
            return [self.rewards(prompts, texts, answers) for texts in samples]
        count = len(samples)
        flat = self.rewards(prompts * count, [text for texts in samples for text in texts], answers * count)
        return [flat[start : start + len(prompts)] for start in range(0, len(flat), len(prompts))]


def _loaded(path: str) -> Function:
    module_name, _, name = path.rpartition(":")
    # a file's path may be another file after a change of folder: own_files keeps modules by their content
    if own_files.split(path) is not None:
        module, _ = own_files.module_of(module_name, f"objective.function={path}")
        return _checked(getattr(module, name, None), path, name)
    return _of_module(path)


@lru_cache
def _of_module(path: str) -> Function:
    module_name, _, name = path.rpartition(":")
    sys.path.insert(0, os.getcwd())  # the `zoft` command does not look there by itself
    try:
        attribute = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise UserError(f"objective.function={path}: {error}; give module:function that Python can import") from error
    finally:
        sys.path.remove(os.getcwd())
    return _checked(attribute, path, name)


def _checked(attribute: Any, path: str, name: str) -> Function:
    """The function, which must take what it is called with."""
    if not callable(attribute):
        raise UserError(f"objective.function={path}: the module has no function called {name}")
    more: dict[str, list[Any]] = {"answers": []} if takes_answers(attribute) else {}
    try:
        inspect.signature(attribute).bind(prompts=[], generations=[], **more)
    except TypeError:
        raise UserError(
            f"objective.function={path} must take prompts and generations, two lists of texts, by these names, and "
            f"answers where it judges by them: it is {name}{inspect.signature(attribute)}, write "
            f"def {name}(prompts, generations)"
        ) from None
    function: Function = attribute
    return function


def takes_answers(function: Function) -> bool:
    """Whether a function is given what rows are judged by."""
    return any(p.name == "answers" or p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
