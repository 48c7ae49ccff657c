"""Metrics of the `evaluate` library: those whose script is on this machine need no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.hub import not_here, not_waited_for, out_of_reach

_SEED = 1  # of what a metric draws (ROUGE's bootstrap): without one it would come from numpy's global state


def computed(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """What a metric of `evaluate` says, its numbers by name.

    Args:
        name: a name that `evaluate` has cached or can reach, or the folder of a metric's script; its code is run.
        predictions: class indices, or texts.
        references: class indices, or a list of right texts for each.

    Raises:
        UserError: it cannot be loaded, or does not take these.
    """
    return loaded(name).compute(predictions, references)


def value_of(metric: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """One number of a metric: the one behind # in its name, else its first.

    Args:
        metric: ``NAME`` or ``NAME#key``, NAME as in :func:`computed`.
        predictions: class indices, or texts.
        references: class indices, or a list of right texts for each.

    Raises:
        UserError: as :func:`computed`; or the metric has no number, or none of that name.
    """
    name, key = split(metric)
    result = computed(name, predictions, references)
    if not result or key not in ("", *result):
        near = did_you_mean(key, result) if key else ""
        raise UserError(f"evaluate:{metric} is no number of that metric, it has {', '.join(result) or 'none'}.{near}")
    return result[key] if key else next(iter(result.values()))


def split(metric: str) -> tuple[str, str]:
    """(name, key) of ``NAME#key``; the key is empty where none is named.

    Example:
        >>> split("metrics/rouge#rougeL"), split("bleu")
        (('metrics/rouge', 'rougeL'), ('bleu', ''))
    """
    name, _, key = metric.partition("#")
    return name, key


@lru_cache
def loaded(name: str) -> Library:
    """A metric, loaded once a process.

    Raises:
        UserError: it cannot be loaded.
    """
    return Library(name)


class Library:
    """A metric of `evaluate`, which takes every right text of a row or only one: the first call finds out.

    Args:
        name: as in :func:`computed`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.takes_several: bool | None = None
        self.metric = self._load()

    def compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        """Its numbers by name, of class indices or texts."""
        first_failure: Exception | None = None
        for several in (True, False) if self.takes_several is None else (self.takes_several,):
            right = [one[0] if isinstance(one, list) and not several else one for one in references]
            try:
                result = self.metric.compute(predictions=list(predictions), references=right)
            except Exception as error:  # a metric that takes one reference a row says so in its own way
                first_failure = first_failure or error
                self.metric = self._load()  # it may hold half of what it refused
                continue
            self.takes_several = several
            numbers = {key: number_of(value) for key, value in (result or {}).items()}
            return {key: value for key, value in numbers.items() if value is not None}
        assert first_failure is not None
        message = f"the evaluate metric {self.name} does not take these predictions: {_first_line(first_failure)}"
        raise UserError(message) from first_failure

    def _load(self) -> Any:
        import evaluate

        try:
            with not_waited_for():
                return evaluate.load(self.name, keep_in_memory=True, seed=_SEED)
        except Exception as error:  # FileNotFoundError, ConnectionError, ImportError of what the script needs, ...
            is_named = not (Path(self.name).exists() or Path(self.name).is_absolute() or self.name.startswith("."))
            if is_named and not isinstance(error, ImportError) and out_of_reach():
                raise not_here(f"the evaluate metric {self.name}", "the folder of its script") from error
            raise UserError(
                f"the evaluate metric {self.name} could not be loaded ({_first_line(error)}): its script must "
                "import what it needs a line each, and without a network give the folder of its script"
            ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


# ---- What functions of other people return, as a float ---------------------------------------------------------------


def number_of(value: Any) -> float | None:
    """A real number of any library as a float, None for everything else.

    Args:
        value: Python's, numpy's or torch's, also as an array or tensor without dimensions; True is 1 and False 0. Text
            is no number.

    Example:
        >>> import numpy, torch
        >>> [number_of(one) for one in (numpy.float32(0.5), torch.tensor(2), numpy.True_, "1", [1.0], 1j)]
        [0.5, 2.0, 1.0, None, None, None]
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # of a whole number or a fraction
        return math.inf
