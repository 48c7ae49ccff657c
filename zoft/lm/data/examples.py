"""Examples as a task gives them: answer options, completions, chats, preference pairs, prompts with a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Part of a masked model's text, encoded by itself.

    Args:
        text: the part's text; None stands for the mask.
        limit: tokens kept of it (its first ones); 0 keeps all.
    """

    text: str | None
    limit: int = 0


MASK = Piece(None)
"""Where the model is asked for a word."""


@dataclass(frozen=True)
class Example:
    """One labelled row as the model reads it.

    Args:
        prompt: what comes before the answer.
        options: the answers to choose from, each with the blank before it; the gold answer alone where answers are
            generated; none where a classification head has a class for each.
        label: index of the right one.
        also_right: indices of other options that are right too: a metric counts them, the loss goes for ``label``.
        answers: gold answers that a generated one is compared with; the best match counts.
        domain: the prompt without the row's content, for calibration (surface-form competition).
        pieces: a masked model's text in place of ``prompt``; where one is :data:`MASK`, ``options`` are words at it.
        max_new_tokens: room in tokens that stays free for a generated answer.
    """

    prompt: str
    options: tuple[str, ...]
    label: int
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    domain: str = ""
    pieces: tuple[Piece, ...] = ()
    max_new_tokens: int = 0


Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""


@dataclass(frozen=True)
class Completion:
    """A prompt and the one text that is to follow it.

    Args:
        prompt: what is given; not trained on.
        completion: what is trained on.
        where: the file and line it comes from.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """A conversation; the assistant's turns are trained on.

    Args:
        messages: its turns, in order.
        where: the file and line it comes from.
    """

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt, the first the better one.

    Args:
        chosen: the prompt with the better answer.
        rejected: the prompt with the other.
        where: the file and line it comes from.
    """

    chosen: Completion | Chat
    rejected: Completion | Chat
    where: str


@dataclass(frozen=True)
class Rated:
    """A prompt, and what a reward function needs to judge an answer.

    Args:
        prompt: what the model answers.
        reward: a number or a text: the right answer, a grade, a rule; None where the prompt says it all.
        where: the file and line it comes from.
    """

    prompt: str
    reward: str | float | None
    where: str


def num_chars(example: Any) -> int:
    """About how many characters an example holds.

    Example:
        >>> num_chars(Completion("2 + 2 =", " 4", "sums.jsonl:1"))
        21
    """
    if isinstance(example, str):
        return len(example)
    if isinstance(example, dict):
        return sum(map(num_chars, example.values()))
    if isinstance(example, tuple):
        return sum(map(num_chars, example))
    return sum(map(num_chars, vars(example).values())) if hasattr(example, "__dataclass_fields__") else 8
