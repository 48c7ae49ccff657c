"""Examples that are no answer options: completions, chats, preference pairs, prompts with a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.tasks.base import Example

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
class Preference:
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
        reward: a number or a text: the right answer, a grade, a rule.
        where: the file and line it comes from.
    """

    prompt: str
    reward: str | float
    where: str


AnyExample = Example | Completion | Chat | Preference | Rated


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
