"""What a parameter may be: a log or linear range, whole numbers, a choice; and how each lies in the unit cube."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError, did_you_mean

_DIGITS = 6  # significant ones of a real value: short on a command line, and the same on every machine


@dataclass(frozen=True)
class Parameter:
    """One axis of a space."""

    def check(self, name: str) -> None:
        """Raise :class:`zoft.errors.UserError` for a range that holds nothing."""

    @property
    def width(self) -> int:
        """How many coordinates of the unit cube it takes."""
        return 1

    @property
    def count(self) -> float:
        """How many values it has."""
        return math.inf

    def value(self, u: Sequence[float]) -> Any:
        """The value at coordinates in [0, 1]."""
        raise NotImplementedError

    def units(self, value: Any) -> list[float] | None:
        """Coordinates of a value; None for one that lies outside."""
        raise NotImplementedError

    @property
    def ends(self) -> list[Any]:
        """Values that a check of the space should try: both ends, or every choice."""
        return [self.value([0.0]), self.value([1.0])]


@dataclass(frozen=True)
class Uniform(Parameter):
    """A real number on a linear scale.

    Args:
        lower: the smallest value.
        upper: the largest one.

    Example:
        >>> Uniform(0, 2).value([0.25]), str(Uniform(0, 2))
        (0.5, 'uniform(0,2)')
    """

    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({self.lower:.12g},{self.upper:.12g})"

    def check(self, name: str) -> None:
        """Both ends finite, and in order."""
        if not (math.isfinite(self.lower) and math.isfinite(self.upper)):
            raise UserError(f"space.{name}={self}: both ends must be finite numbers")
        if self.lower >= self.upper:
            raise UserError(f"space.{name}={self}: the lower end must be below the upper one")

    def value(self, u: Sequence[float]) -> Any:
        """lower + u * (upper - lower), to six digits."""
        return self.rounded(self.lower + u[0] * (self.upper - self.lower))

    def rounded(self, value: float) -> float:
        """To six digits, and within the ends."""
        return min(max(float(f"{value:.{_DIGITS}g}"), self.lower), self.upper)

    def units(self, value: Any) -> list[float] | None:
        """Its place between the ends."""
        if not _is_number(value) or not self.lower <= value <= self.upper:
            return None
        return [(value - self.lower) / (self.upper - self.lower)]


@dataclass(frozen=True)
class Log(Uniform):
    """A real number > 0 on a logarithmic scale.

    Example:
        >>> Log(1e-5, 1e-1).value([0.5]), str(Log(1e-5, 1e-1))
        (0.001, 'log(1e-05,0.1)')
    """

    def check(self, name: str) -> None:
        """Both ends > 0, and in order."""
        _check_log(self, name, "uniform")
        super().check(name)

    def value(self, u: Sequence[float]) -> float:
        """lower^(1 - u) * upper^u, to six digits."""
        return self.rounded(math.exp((1 - u[0]) * math.log(self.lower) + u[0] * math.log(self.upper)))

    def units(self, value: Any) -> list[float] | None:
        """Its place between the logarithms of the ends."""
        if not _is_number(value) or not self.lower <= value <= self.upper:
            return None
        return [math.log(value / self.lower) / math.log(self.upper / self.lower)]


@dataclass(frozen=True)
class Int(Uniform):
    """A whole number; each takes an equal part of the coordinate.

    Args:
        lower: the smallest value.
        upper: the largest one, itself included.

    Example:
        >>> [Int(1, 4).value([u]) for u in (0, 0.24, 0.26, 1)]
        [1, 1, 2, 4]
    """

    def check(self, name: str) -> None:
        """Both ends whole, and in order."""
        super().check(name)
        if self.lower != int(self.lower) or self.upper != int(self.upper):
            raise UserError(f"space.{name}={self}: both ends must be whole numbers; uniform(...) takes real ones")

    @property
    def count(self) -> float:
        """upper - lower + 1."""
        return int(self.upper) - int(self.lower) + 1

    def value(self, u: Sequence[float]) -> int:
        """The number whose part u falls into."""
        return min(int(self.lower) + int(u[0] * self.count), int(self.upper))

    def units(self, value: Any) -> list[float] | None:
        """The middle of its part."""
        if not _is_number(value) or not self.lower <= value <= self.upper or value != int(value):
            return None
        return [(int(value) - int(self.lower) + 0.5) / self.count]


@dataclass(frozen=True)
class LogInt(Int):
    """A whole number >= 1 on a logarithmic scale: a real one between lower - 1/2 and upper + 1/2, rounded.

    Example:
        >>> [LogInt(1, 64).value([u]) for u in (0, 0.5, 1)]
        [1, 6, 64]
    """

    def check(self, name: str) -> None:
        """Both ends >= 1, whole, and in order."""
        _check_log(self, name, "int")
        super().check(name)

    def value(self, u: Sequence[float]) -> int:
        """The nearest whole number."""
        low, high = math.log(self.lower - 0.5), math.log(self.upper + 0.5)
        return min(max(round(math.exp(low + u[0] * (high - low))), int(self.lower)), int(self.upper))

    def units(self, value: Any) -> list[float] | None:
        """Its place between the logarithms."""
        if not _is_number(value) or not self.lower <= value <= self.upper or value != int(value):
            return None
        return [math.log(value / (self.lower - 0.5)) / math.log((self.upper + 0.5) / (self.lower - 0.5))]


@dataclass(frozen=True)
class Choice(Parameter):
    """One of several values without an order.

    Two options are the halves of one coordinate; more take one coordinate each, and the largest coordinate wins.

    Args:
        options: the values: text, numbers, true, false or null.

    Example:
        >>> Choice(("sgd", "adam")).value([0.7]), Choice(("a", "b", "c")).value([0.1, 0.2, 0.9])
        ('adam', 'c')
    """

    options: tuple[Any, ...]

    def __str__(self) -> str:
        return f"choice({','.join(map(written, self.options))})"

    def check(self, name: str) -> None:
        """Two options or more, all different."""
        if len(self.options) < 2:
            raise UserError(
                f"space.{name}={self}: a choice needs two options or more; a single value is set outside of the space, "
                f"{name}=..."
            )
        if len(set(map(written, self.options))) < len(self.options):
            raise UserError(f"space.{name}={self}: an option stands there twice")

    @property
    def width(self) -> int:
        """One coordinate for two options, else one for each."""
        return 1 if len(self.options) == 2 else len(self.options)

    @property
    def count(self) -> float:
        """How many options there are."""
        return len(self.options)

    def value(self, u: Sequence[float]) -> Any:
        """The option of the half, or of the largest coordinate (the first of equal ones)."""
        return self.options[int(u[0] > 0.5) if len(u) == 1 else max(range(len(u)), key=lambda i: u[i])]

    def units(self, value: Any) -> list[float] | None:
        """A little on the option's side of the middle, so that others are near."""
        names = [written(option) for option in self.options]
        if written(value) not in names:
            return None
        at = names.index(written(value))
        return [0.4 + 0.2 * at] if self.width == 1 else [0.6 if i == at else 0.4 for i in range(self.width)]

    @property
    def ends(self) -> list[Any]:
        """All of them."""
        return list(self.options)


KINDS: dict[str, Callable[..., Parameter]] = {"log": Log, "uniform": Uniform, "int": Int, "logint": LogInt}
"""Ranges by the name they are written with; a choice takes its options as they are."""


def parsed(name: str, text: Any) -> Parameter:
    """A parameter from how it is written.

    Args:
        name: of the parameter, for messages.
        text: ``log(a,b)``, ``uniform(a,b)``, ``int(a,b)``, ``logint(a,b)``, ``choice(a,b,...)``; or a parameter.

    Raises:
        UserError: another form, and a range that holds nothing.

    Example:
        >>> parsed("lr", "log(1e-5, 1e-1)"), parsed("nesterov", "choice(true,false)")
        (Log(lower=1e-05, upper=0.1), Choice(options=(True, False)))
    """
    if not isinstance(text, Parameter):
        text = _of_text(name, str(text))
    text.check(name)
    return text


def _of_text(name: str, text: str) -> Parameter:
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    forms = "log(1e-5,1e-1), uniform(0,1), int(1,8), logint(1,64) or choice(a,b)"
    if not found:
        raise UserError(f"space.{name}={text}: write {forms}")
    kind, inside = found.groups()
    items = [item.strip() for item in _items(inside)] if inside.strip() else []
    if kind == "choice":
        return Choice(tuple(_scalar(item) for item in items))
    if kind not in KINDS:
        raise UserError(f"space.{name}={text}: there is no scale {kind!r}.{did_you_mean(kind, [*KINDS, 'choice'])}")
    try:
        lower, upper = map(float, items)
    except ValueError:
        raise UserError(f"space.{name}={text}: {kind} takes two numbers, as in {forms}") from None
    return KINDS[kind](lower, upper)


def _items(text: str) -> list[str]:
    """Cut at commas, but not within brackets or quotes."""
    return re.findall(r"""((?:"[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[^,"'\[{])+)""", text)


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def written(value: Any) -> str:
    """A value as it is written on the command line.

    Example:
        >>> written(True), written(None), written(1e-05), written("adam")
        ('true', 'null', '1e-05', 'adam')
    """
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_log(parameter: Uniform, name: str, instead: str) -> None:
    if parameter.lower <= 0 or parameter.upper <= 0:
        raise UserError(
            f"space.{name}={parameter}: a logarithmic scale needs both ends > 0; {instead}(...) is the linear one"
        )


# ---- A space of named parameters, and the unit cube that a search moves in -------------------------------------------

Values = dict[str, Any]
"""A point: the value of every parameter, by name."""


class SearchSpace:
    """Parameters by name, each with its coordinates in the unit cube, one after the other.

    Args:
        parameters: name -> ``log(a,b)``, ``uniform(a,b)``, ``int(a,b)``, ``logint(a,b)``, ``choice(a,b,...)``, or an
            object of :mod:`zoft.tuning.parameters`.

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


def as_arguments(values: Values) -> str:
    """A point as arguments of the command line."""
    return " ".join(f"{name}={written(value)}" for name, value in values.items())
