"""A conversation on the terminal, with the model before training beside the tuned one where that is asked for."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from zoft.use.inference.generate import WritingSettings, chat_ids, written
from zoft.use.inference.load import Loaded

Message = dict[str, str]
GAP = " │ "
_NARROWEST = 60  # columns below which two texts stand under each other


@dataclass
class Conversation:
    """One model's turns.

    Args:
        system: what the system says first; empty for the template's own.
        messages: the turns so far.
    """

    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, answer: Callable[[list[Message]], str]) -> str:
        """Add a turn of the user's and the answer to it; a turn that fails is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            reply = answer(self.messages).strip()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": reply})
        return reply


@dataclass
class Talk:
    """The loop: a line of the user's, an answer (or two, side by side).

    Args:
        loaded: the model.
        how: length, temperature and seed of the answers.
        compare: whether the model before training answers too, in a conversation of its own.
        system: what the system says first.
        width: columns of the terminal.
    """

    loaded: Loaded
    how: WritingSettings
    compare: bool = False
    system: str = ""
    width: int = 80

    def run(self, lines: Iterable[str], say: Callable[[str], None]) -> None:
        """Answer line by line until they end or one is /quit; /reset begins anew."""
        tuned, base = Conversation(self.system), Conversation(self.system)
        for line in lines:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text == "/reset":
                tuned.reset()
                base.reset()
                say("a new conversation")
            elif text:
                answer = tuned.ask(text, self._tuned)
                say(beside(base.ask(text, self._base), answer, self.width) if self.compare else answer)

    def _tuned(self, messages: list[Message]) -> str:
        return written(self.loaded, [chat_ids(self.loaded, messages, self.how.max_new_tokens)], self.how)[0]

    def _base(self, messages: list[Message]) -> str:
        with self.loaded.base() as model:
            return written(self.loaded, [chat_ids(self.loaded, messages, self.how.max_new_tokens)], self.how, model)[0]


def beside(base: str, tuned: str, width: int) -> str:
    """Two texts in two columns under their names; under each other where the terminal is narrow.

    Example:
        >>> print(beside("It rains.", "It pours, and it will go on for the whole of the day.", 60))
        base                         │ tuned
        It rains.                    │ It pours, and it will go on
                                     │ for the whole of the day.
        >>> print(beside("a", "b", 30))
        base   a
        tuned  b
    """
    if width < _NARROWEST:
        return f"base   {base}\ntuned  {tuned}"
    column = (width - len(GAP)) // 2
    left, right = (["base", *_wrapped(base, column)], ["tuned", *_wrapped(tuned, column)])
    pairs = itertools.zip_longest(left, right, fillvalue="")
    return "\n".join(f"{a:<{column}}{GAP}{b}".rstrip() for a, b in pairs)


def _wrapped(text: str, width: int) -> list[str]:
    return [line for part in text.splitlines() or [""] for line in textwrap.wrap(part, width) or [""]]
