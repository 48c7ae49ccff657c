"""Arguments of a verb: its own keys, its flags, and what is left for the config."""

from __future__ import annotations

from collections.abc import Sequence

from zoft.errors import UserError, did_you_mean


def parsed(
    verb: str, arguments: Sequence[str], keys: Sequence[str], flags: Sequence[str]
) -> tuple[dict[str, str], list[str], set[str]]:
    """(the verb's own keys, arguments of the config, flags).

    Args:
        verb: for the messages.
        arguments: as typed.
        keys: names that the verb takes as ``key=value``.
        flags: words that it takes, with their dashes.

    Raises:
        UserError: a flag that there is not, or a word that is neither.

    Example:
        >>> parsed("predict", ["run=a", "model.dtype=float16", "--json"], ["run"], ["--json"])
        ({'run': 'a'}, ['model.dtype=float16'], {'--json'})
    """
    own: dict[str, str] = {}
    rest: list[str] = []
    given: set[str] = set()
    for word in arguments:
        key, equals, value = word.partition("=")
        if word in flags:
            given.add(word)
        elif word.startswith("-"):
            own_key = f" Did you mean {word.lstrip('-')}?" if key.lstrip("-") in keys and equals else ""
            near = own_key or did_you_mean(word, [*flags, "--help"])
            raise UserError(f"zoft {verb} has no flag {word!r}.{near} See zoft {verb} --help")
        elif not equals:
            hint = f" Did you mean {keys[0]}={word}?"
            raise UserError(f"{word!r} is not an argument of zoft {verb}: write key=value.{hint}")
        elif key in keys:
            own[key] = value
        else:
            rest.append(word)
    return own, rest, given
