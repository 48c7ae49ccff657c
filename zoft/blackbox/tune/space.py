"""A space of named parameters, and the unit cube that a search moves in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from zoft.blackbox.tune.parameters import Choice, Parameter, parsed, written
from zoft.errors import UserError, did_you_mean

Values = dict[str, Any]
"""A point: the value of every parameter, by name."""


class SearchSpace:
    """Parameters by name, each with its coordinates in the unit cube, one after the other.

    Args:
        parameters: name -> ``log(a,b)``, ``uniform(a,b)``, ``int(a,b)``, ``logint(a,b)``, ``choice(a,b,...)``, or an
            object of :mod:`zoft.blackbox.tune.parameters`.

    Raises:
        UserError: no parameter, or one that holds nothing.

    Example:
        >>> space = SearchSpace({"lr": "log(1e-4,1)", "layers": "int(1,3)"})
        >>> space.values([0.5, 0.9])
        {'lr': 0.01, 'layers': 3}
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        if not isinstance(parameters, Mapping) or not parameters:
            raise UserError("the space is empty: give at least one parameter, e.g. learning_rate: log(1e-5,1e-1)")
        self.parameters: dict[str, Parameter] = {name: parsed(name, text) for name, text in parameters.items()}

    def texts(self) -> dict[str, str]:
        """Name -> how it is written."""
        return {name: str(parameter) for name, parameter in self.parameters.items()}

    @property
    def width(self) -> int:
        """d: coordinates of the cube."""
        return sum(parameter.width for parameter in self.parameters.values())

    @property
    def count(self) -> float:
        """How many points there are."""
        return math.prod(parameter.count for parameter in self.parameters.values())

    @property
    def is_mostly_choices(self) -> bool:
        """Whether at least half of the coordinates are those of choices, which have no slope to follow."""
        chosen = sum(p.width for p in self.parameters.values() if isinstance(p, Choice))
        return 2 * chosen >= self.width

    def values(self, u: Sequence[float]) -> Values:
        """The point at coordinates [d] in [0, 1]."""
        values, at = {}, 0
        for name, parameter in self.parameters.items():
            values[name] = parameter.value([float(x) for x in u[at : at + parameter.width]])
            at += parameter.width
        return values

    def units(self, values: Mapping[str, Any] | None) -> list[float]:
        """Coordinates of a point; the middle for every parameter that is not given, or lies outside of its range."""
        u: list[float] = []
        for name, parameter in self.parameters.items():
            place = parameter.units(values[name]) if values is not None and name in values else None
            u += place or [0.5] * parameter.width
        return u

    def check(self, values: Mapping[str, Any]) -> None:
        """Refuse a start that names other parameters, or values outside of them."""
        for name, value in values.items():
            if name not in self.parameters:
                raise UserError(f"x0 has {name!r}, which the space has not.{did_you_mean(name, self.parameters)}")
            if self.parameters[name].units(value) is None:
                raise UserError(f"x0[{name!r}] is {written(value)}, which is not in {self.parameters[name]}")


def key(values: Values) -> str:
    """What tells points apart, also after they were written to a journal."""
    return json.dumps(values, sort_keys=True)


def told(values: Values) -> str:
    """A point as arguments of the command line."""
    return " ".join(f"{name}={written(value)}" for name, value in values.items())
