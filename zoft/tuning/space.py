"""The search space: Optuna's distributions by name, how each is written, and how each lies in the unit cube."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from zoft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Values: TypeAlias = dict[str, Any]
"""A point: the value of every parameter, by name."""

_DIGITS = 6  # significant ones of a real value: short on a command line, and the same on every machine
_FORMS = "log(1e-5,1e-1), uniform(0,1), int(1,8), logint(1,64) or choice(a,b)"
_SCALES = ("log", "uniform", "int", "logint")


def load_optuna() -> Any:
    """The optuna package, its messages silenced; what to install where it is missing."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search over parameters needs a package: pip install 'zoft[tune]' (or optuna)") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


# ---- How a parameter is written --------------------------------------------------------------------------------------


def parsed(name: str, text: Any) -> BaseDistribution:
    """A distribution from how it is written.

    Args:
        name: of the parameter, for messages.
        text: ``log(a,b)``, ``uniform(a,b)``, ``int(a,b)``, ``logint(a,b)``, ``choice(a,b,...)``; or one of Optuna's
            distributions.

    Raises:
        UserError: another form, and a range that holds nothing.

    Example:
        >>> parsed("lr", "log(1e-5, 1e-1)"), parsed("nesterov", "choice(true,false)").choices
        (FloatDistribution(high=0.1, log=True, low=1e-05, step=None), (True, False))
    """
    distributions = load_optuna().distributions
    if isinstance(text, distributions.BaseDistribution):
        return _served(name, text)
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", str(text), re.DOTALL)
    if not match:
        raise UserError(f"space.{name}={text}: write {_FORMS}")
    scale, inside = match.groups()
    items = [item.strip() for item in _items(inside)] if inside.strip() else []
    if scale == "choice":
        return _choice(name, items)
    if scale not in _SCALES:
        raise UserError(f"space.{name}={text}: there is no scale {scale!r}.{did_you_mean(scale, [*_SCALES, 'choice'])}")
    try:
        low, high = map(float, items)
    except ValueError:
        raise UserError(f"space.{name}={text}: {scale} takes two numbers, as in {_FORMS}") from None
    _check_range(f"space.{name}={scale}({low:.12g},{high:.12g})", scale, low, high)
    if scale.endswith("int"):
        return distributions.IntDistribution(int(low), int(high), log=scale == "logint")
    return distributions.FloatDistribution(low, high, log=scale == "log")


def _check_range(written_as: str, scale: str, low: float, high: float) -> None:
    if scale.startswith("log") and min(low, high) <= 0:
        linear = "int" if scale == "logint" else "uniform"
        raise UserError(f"{written_as}: a logarithmic scale needs both ends > 0; {linear}(...) is the linear one")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{written_as}: both ends must be finite numbers")
    if low >= high:
        raise UserError(f"{written_as}: the lower end must be below the upper one")
    if scale.endswith("int") and (low != int(low) or high != int(high)):
        raise UserError(f"{written_as}: both ends must be whole numbers; uniform(...) takes real ones")


def _choice(name: str, items: Sequence[str]) -> CategoricalDistribution:
    options = tuple(_scalar(item) for item in items)
    written_as = f"space.{name}=choice({','.join(map(written, options))})"
    if len(options) < 2:
        raise UserError(
            f"{written_as}: a choice needs two options or more; a single value is set outside of the space, {name}=..."
        )
    if len({written(option) for option in options}) < len(options) or len({*options}) < len(options):
        raise UserError(f"{written_as}: an option stands there twice")
    categorical: CategoricalDistribution = load_optuna().distributions.CategoricalDistribution(options)
    return categorical


def _served(name: str, distribution: Any) -> BaseDistribution:
    """One of Optuna's own, if it can be written down."""
    if getattr(distribution, "step", None) not in (None, 1):
        raise UserError(
            f"space.{name}={distribution}: a step is not served; leave it out, or list the values in a choice"
        )
    parsed(name, text_of(distribution))  # a range that holds nothing is refused here
    served: BaseDistribution = distribution
    return served


def text_of(distribution: Any) -> str:
    """How a distribution is written.

    Example:
        >>> text_of(parsed("eps", "log(1e-4,1e-2)"))
        'log(0.0001,0.01)'
    """
    if hasattr(distribution, "choices"):
        return f"choice({','.join(map(written, distribution.choices))})"
    is_whole = isinstance(distribution, load_optuna().distributions.IntDistribution)
    scale = ("logint" if is_whole else "log") if distribution.log else ("int" if is_whole else "uniform")
    return f"{scale}({distribution.low:.12g},{distribution.high:.12g})"


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


def key(values: Values) -> str:
    """A key that is equal exactly for equal points, also after they were written to a file and read back."""
    return json.dumps(values, sort_keys=True)


def as_arguments(values: Values) -> str:
    """A point as arguments of the command line."""
    return " ".join(f"{name}={written(value)}" for name, value in values.items())


# ---- How it lies in the unit cube ------------------------------------------------------------------------------------


class Range:
    """A range of numbers on one coordinate u of [0, 1].

    Real numbers: ``low + u (high - low)``, or ``low^(1-u) high^u`` on a logarithmic scale. Whole numbers have equal
    parts of the coordinate; on a logarithmic scale they are real ones between low - 1/2 and high + 1/2, rounded.

    Example:
        >>> Range(parsed("lr", "log(1e-5,1e-1)")).value([0.5])
        0.001
        >>> [Range(parsed("q", "int(1,4)")).value([u]) for u in (0, 0.24, 0.26, 1)]
        [1, 1, 2, 4]
    """

    width = 1

    def __init__(self, distribution: FloatDistribution | IntDistribution) -> None:
        self.low, self.high, self.log = distribution.low, distribution.high, distribution.log
        self.is_whole = isinstance(distribution, load_optuna().distributions.IntDistribution)
        margin = (0.5 if self.log else 0.0) if self.is_whole else 0.0
        self.left, self.right = self.low - margin, self.high + margin + (self.is_whole and not self.log)

    @property
    def count(self) -> float:
        """How many values it has."""
        return self.high - self.low + 1 if self.is_whole else math.inf

    def value(self, u: Sequence[float]) -> Any:
        """The value at u."""
        if self.log:
            x = math.exp((1 - u[0]) * math.log(self.left) + u[0] * math.log(self.right))
        else:
            x = self.left + u[0] * (self.right - self.left)
        return self.rounded(x)

    def rounded(self, x: float) -> Any:
        """A real value to six digits, a whole one to a number; within the ends."""
        whole = round if self.log else math.floor
        x = whole(x) if self.is_whole else float(f"{x:.{_DIGITS}g}")
        return min(max(x, self.low), self.high)

    def units(self, value: Any) -> list[float] | None:
        """Its coordinate (the middle of a whole number's part); None for what lies outside."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high or (self.is_whole and value != int(value)):
            return None
        if self.log:
            return [math.log(value / self.left) / math.log(self.right / self.left)]
        return [(value + (0.5 if self.is_whole else 0.0) - self.left) / (self.right - self.left)]

    @property
    def ends(self) -> list[Any]:
        """Values that a check of the space should try."""
        return [self.low, self.high]


class Choice:
    """Options without an order: two are the halves of one coordinate; more take one each, and the largest wins.

    Example:
        >>> Choice(parsed("a", "choice(sgd,adam)")).value([0.7])
        'adam'
        >>> Choice(parsed("a", "choice(a,b,c)")).value([0.1, 0.2, 0.9])
        'c'
    """

    def __init__(self, distribution: CategoricalDistribution) -> None:
        self.options = distribution.choices
        self.count = float(len(self.options))
        self.width = 1 if len(self.options) == 2 else len(self.options)

    def value(self, u: Sequence[float]) -> Any:
        """The option of the half, or of the largest coordinate (the first of equal ones)."""
        return self.options[int(u[0] > 0.5) if len(u) == 1 else max(range(len(u)), key=lambda i: u[i])]

    def rounded(self, value: Any) -> Any:
        """The option itself."""
        return value

    def units(self, value: Any) -> list[float] | None:
        """A little on the option's side of the middle, so that others are near; None for no option."""
        names = [written(option) for option in self.options]
        if written(value) not in names:
            return None
        at = names.index(written(value))
        return [0.4 + 0.2 * at] if self.width == 1 else [0.6 if i == at else 0.4 for i in range(self.width)]

    @property
    def ends(self) -> list[Any]:
        """All of them."""
        return list(self.options)


class SearchSpace:
    """Parameters by name, each with its coordinates in the unit cube, one after the other.

    Args:
        parameters: name -> how it is written, or one of Optuna's distributions; see :func:`parsed`.

    Raises:
        UserError: no parameter, or one that holds nothing.

    Example:
        >>> space = SearchSpace({"lr": "log(1e-4,1)", "layers": "int(1,3)"})
        >>> space.values([0.5, 0.9]), space.width
        ({'lr': 0.01, 'layers': 3}, 2)
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        if not isinstance(parameters, Mapping) or not parameters:
            raise UserError("the space is empty: give at least one parameter, e.g. learning_rate: log(1e-5,1e-1)")
        self.distributions = {name: parsed(name, text) for name, text in parameters.items()}
        self.parameters: dict[str, Range | Choice] = {
            name: Choice(distribution) if hasattr(distribution, "choices") else Range(distribution)
            for name, distribution in self.distributions.items()
        }

    def texts(self) -> dict[str, str]:
        """Name -> how it is written."""
        return {name: text_of(distribution) for name, distribution in self.distributions.items()}

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
        return 2 * sum(p.width for p in self.parameters.values() if isinstance(p, Choice)) >= self.width

    def values(self, u: Sequence[float]) -> Values:
        """The point at coordinates [d] in [0, 1]."""
        values, at = {}, 0
        for name, parameter in self.parameters.items():
            values[name] = parameter.value([float(x) for x in u[at : at + parameter.width]])
            at += parameter.width
        return values

    def rounded(self, values: Mapping[str, Any]) -> Values:
        """A point as it is evaluated: in the space's order, real values to six digits."""
        return {name: parameter.rounded(values[name]) for name, parameter in self.parameters.items()}

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
                raise UserError(
                    f"x0[{name!r}] is {written(value)}, which is not in {text_of(self.distributions[name])}"
                )
