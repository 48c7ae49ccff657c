"""Words of a command line: a verb's own ``key=value``, its flags, its options, and what is left for the config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from zoft.errors import UserError, did_you_mean


def counted(number: int, noun: str) -> str:
    """A number with its noun, which is given as of several.

    Example:
        >>> counted(1, "queries"), counted(1, "rows"), counted(2000, "rows")
        ('1 query', '1 row', '2,000 rows')
    """
    one = f"{noun[:-3]}y" if noun.endswith("ies") else noun[:-1]
    return f"{number:,} {one if number == 1 else noun}"


class Words(NamedTuple):
    """A command line, sorted.

    Args:
        own: the verb's own keys -> their text.
        rest: the other words, in their order: arguments of the config, or bare words.
        flags: those that were given, with their dashes.
        options: flags with a value, with their dashes -> the value.
    """

    own: dict[str, str]
    rest: list[str]
    flags: set[str]
    options: dict[str, str]


def folder_of(word: str) -> str:
    """A run's folder, also where it is written ``run=DIR`` as other verbs want it."""
    return word.removeprefix("run=")


def read_words(
    verb: str,
    arguments: Sequence[str],
    *,
    keys: Sequence[str] = (),
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    bare: bool = True,
) -> Words:
    """Sort the words of a command line.

    Args:
        verb: for the messages.
        arguments: as typed.
        keys: names that the verb takes as ``key=value``.
        flags: words that it takes, with their dashes.
        options: flags that take a value, ``--rows 3`` or ``--rows=3``, with their dashes.
        bare: whether a word without ``=`` is left in ``rest``; it is refused otherwise.

    Raises:
        UserError: a flag that there is not, a key or option that is given twice or without a value, a bare word.

    Example:
        >>> words = read_words("predict", ["run=a", "model.dtype=float16", "--json"], keys=["run"], flags=["--json"])
        >>> words.own, words.rest, words.flags
        ({'run': 'a'}, ['model.dtype=float16'], {'--json'})
        >>> read_words("eval", ["--jsn"], flags=["--json"])
        Traceback (most recent call last):
        zoft.errors.UserError: zoft eval has no flag '--jsn'. Did you mean --json? See zoft eval --help
    """
    words = Words({}, [], set(), {})
    waiting = iter(arguments)
    for word in waiting:
        name, equals, value = word.partition("=")
        if word in flags:
            words.flags.add(word)
        elif name in options:
            value = value if equals else next(waiting, "")
            if not value or (not equals and value.startswith("--")):
                raise UserError(f"{name} is followed by a value: {name} VALUE. See zoft {verb} --help")
            _set(words.options, name, value)
        # a key that was written like a flag is the likeliest slip
        elif word.startswith("-"):
            as_key = f" Did you mean {word.lstrip('-')}?" if name.lstrip("-") in keys and equals else ""
            near = as_key or did_you_mean(name, [*flags, *options, "--help"])
            raise UserError(f"zoft {verb} has no flag {word!r}.{near} See zoft {verb} --help")
        elif equals and name in keys:
            _set(words.own, name, value)
        # a folder alone is likely a run or a model: which is for the user to say
        elif not equals and "run" in keys and Path(word).is_dir():
            raise UserError(
                f"{word!r} is a folder: write run={word} for a run of zoft train, or model.name={word} for a model"
            )
        elif not equals and not bare:
            hint = f" Did you mean {keys[0]}={word}?" if keys else ""
            raise UserError(f"{word!r} is not an argument of zoft {verb}: write key=value.{hint}")
        else:
            words.rest.append(word)
    return words


def refuse_near_miss(verb: str, word: str, keys: Iterable[str], others: Iterable[str]) -> None:
    """Refuse a setting of the verb that is written wrongly: it would be looked for in the config.

    Args:
        verb: for the message.
        word: one of ``rest``.
        keys: the verb's own.
        others: the names that a config begins with.

    Raises:
        UserError: the name is not known, and near to one of ``keys`` or of the other names.

    Example:
        >>> refuse_near_miss("tune", "repeat=3", ["repeats"], ["seed"])
        Traceback (most recent call last):
        zoft.errors.UserError: zoft tune has no setting 'repeat'. Did you mean repeats?
    """
    name, known = word.partition("=")[0], set(others)
    near = did_you_mean(name, {*keys, *known})
    # nested keys belong to the config, whose own check says what is wrong with them
    if "." not in name and name.lstrip("+~") not in known and near.startswith(" Did"):
        raise UserError(f"zoft {verb} has no setting {name!r}.{near}")


def _set(values: dict[str, str], name: str, value: str) -> None:
    if name in values:
        raise UserError(f"{name} is given twice, as {values[name]!r} and {value!r}: leave one out")
    values[name] = value
