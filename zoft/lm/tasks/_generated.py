"""Tasks whose answer the model writes: trained on the first gold answer, scored against all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.lm.data.examples import Example
from zoft.lm.tasks._rows import RowsTask


@dataclass
class GeneratedTask(RowsTask):
    r"""A prompt and gold answers; generation ends at :attr:`stop`.

    Args:
        max_new_tokens: tokens an answer may have; they are kept free in ``max_length``, in training too.
    """

    metric = "f1"

    stop: ClassVar[str] = "\n"
    """What ends an answer; it belongs to the text that is trained on."""

    max_new_tokens: int = 50

    def check(self) -> None:
        """Refuse an answer of no length, or one that leaves no room for a prompt."""
        super().check()
        room = (self.max_length or 1 << 20) - 8
        self.require(1 <= self.max_new_tokens <= room, "max_new_tokens", f"between 1 and {room} (max_length - 8)")

    @property
    def kind(self) -> str:
        """Answers are generated."""
        return "generate"

    def answered(self, prompt: str, written: str, answers: list[str]) -> Example:
        """``prompt``, then the answer to train on; ``answers`` are what a generated one is compared with."""
        return Example(
            prompt, (f" {written}{self.stop}",), 0, answers=tuple(answers), max_new_tokens=self.max_new_tokens
        )

    def answer_in(self, generated: str) -> str:
        r"""The answer in a text that the model has written: what stands before :attr:`stop`.

        Example:
            >>> GeneratedTask().answer_in(" Paris\nQuestion: ...")
            'Paris'
        """
        return generated.partition(self.stop)[0].strip()
