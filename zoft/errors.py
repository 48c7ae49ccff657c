"""Errors that a user can mend: each message says what is wrong, where, and what to change."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_OF_COMMANDS = re.compile(r"(?<![\w.])(budget\.queries|precision\.update|trainable=|trainer\.\w+\b(?!\())")


class UserError(ValueError):
    """Something the user can mend: the message says what, where and how; the command line exits with 2.

    Example:
        >>> raise UserError("estimator.eps must be > 0 and finite, got -1.0: set estimator.eps=1e-3")
        Traceback (most recent call last):
        zoft.errors.UserError: estimator.eps must be > 0 and finite, got -1.0: set estimator.eps=1e-3
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        # a traceback shows notes; the command line, whose names these are, prints the sentence alone
        if names := dict.fromkeys(_OF_COMMANDS.findall(str(self))):
            self.add_note("In Python: " + ", ".join(f"{name} is {_field_of(name)}" for name in names))


def _field_of(name: str) -> str:
    """What Python code sets where the command line has ``name``."""
    others = {"budget.queries": "budget_queries", "precision.update": "precision_update"}
    return "requires_grad" if name == "trainable=" else others.get(name, name.removeprefix("trainer."))


class IgnoredError(UserError):
    """A setting that would change nothing in this run."""


class OutOfMemoryError(UserError, RuntimeError):
    """A query did not fit; the weights are what they were (with ``in_place`` and ``subtract``, to the last bit or two).

    A RuntimeError, as torch's own: who halves batches waits for one (``auto_find_batch_size``).
    """


class DiskFullError(UserError):
    """Something could not be written; what lay on the disk before is whole."""

    @classmethod
    def of(cls, error: OSError, path: Path, size: int) -> DiskFullError:
        """The error as a sentence, with the bytes that were wanted and those that are free.

        Args:
            error: what the system said.
            path: what was being written.
            size: its bytes, as far as known.
        """
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return cls(f"{path} cannot be written: {error.strerror or error}; repeat the command once it can")
        free = shutil.disk_usage(existing).free
        wanted = (
            f"{size:,} bytes are wanted, {free:,} are free" if size else f"{free:,} bytes are free, and are not enough"
        )
        return cls(
            f"the disk of {path} is full: {wanted}. What was saved before is whole: "
            "free some space and repeat the command, and the run goes on"
        )


def os_error_of(error: Exception) -> OSError | None:
    """What the system said, also where safetensors says it as an error of its own; None where it was not the system.

    Example:
        >>> os_error_of(RuntimeError("I/O error: No space left on device (os error 28)")).errno == errno.ENOSPC
        True
    """
    if isinstance(error, OSError):
        return error
    match = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))
    return OSError(int(match.group(1)), os.strerror(int(match.group(1)))) if match else None


class NonFiniteLossError(RuntimeError):
    """Too many steps in a row had a non-finite loss; the weights are untouched by them; exit code 1."""


class Requeued(KeyboardInterrupt):
    """A scheduler's signal ended the run, which the same command goes on with; exit code 75."""


class ServerLostError(Requeued):
    """A server that computes the forwards is gone; the weights are those of the last step, and exit code 75 follows."""


_is_recorded: ContextVar[bool] = ContextVar("is_recorded", default=False)

Conditions = Mapping[str, tuple[str, tuple[Any, ...]]]
"""A field -> another one, and the values of that with which the first counts; none named: all but its default."""


@contextmanager
def of_recorded(is_recorded: bool) -> Iterator[None]:
    """Let pass in here what does nothing: a run recorded it, or it counts in other cells of a sweep."""
    token = _is_recorded.set(is_recorded)
    try:
        yield
    finally:
        _is_recorded.reset(token)


def refuse_ignored(message: str) -> None:
    """Refuse a setting that would change nothing, unless a run has recorded it."""
    if not _is_recorded.get():
        raise IgnoredError(message)


def refuse_unmet(conditions: Conditions, values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> None:
    """Refuse a setting whose condition does not hold; one that is left at its default is no choice."""
    for name, (other, counting) in conditions.items():
        value, chosen = values[name], values[other]
        holds = chosen in counting if counting else chosen != defaults[other]
        if not holds and value != defaults[name]:
            instead = f" to {' or '.join(map(_shown, counting))}" if counting else " too"
            refuse_ignored(
                f"{prefix}{name}={_shown(value)} does nothing with {prefix}{other}={_shown(chosen)}: leave it out, or "
                f"set {prefix}{other}{instead}"
            )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The near ones of ``known`` as a phrase, or all of them when none is near.

    Args:
        word: what the user wrote.
        known: the words that would have been right.

    Returns:
        A phrase that begins with a space, or the empty string when ``known`` is empty.

    Example:
        >>> did_you_mean("epss", ["eps", "law"])
        ' Did you mean eps?'
    """
    if word.endswith(".py"):
        return f" Of a file name one part, {word}:NAME; zoft ls {word} lists them."
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.55)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" Known: {', '.join(names)}." if names else ""
