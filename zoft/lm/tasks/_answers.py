"""Tasks of rows by their answers: one of a few words, one of the row's own texts, or a text that the model writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row, column
from zoft.lm.tasks._fields import one_of, text, texts
from zoft.lm.tasks._rows import RowsTask
from zoft.lm.tasks.base import PROMPTS


@dataclass
class WordsTask(RowsTask):
    """A template over text columns, and the same few words to choose from in every row: one for each label."""

    prompts = PROMPTS

    columns: ClassVar[tuple[str, ...]] = ()
    """The text columns, in the order that raw text has them."""

    labels: ClassVar[tuple[str, ...]] = ()
    """Names of the labels, in the order of the hub's numbers."""

    words: ClassVar[tuple[str, ...]] = ()
    """The word for each label, with the blank before it where the template has one."""

    template: ClassVar[str] = ""
    domain: ClassVar[str] = ""

    def example(self, row: Row, source: str, number: int) -> Example:
        """The template filled in; or the raw text, its columns on lines of their own."""
        label = self.label(row, source, number)
        values = {name: text(row, name, source, number) for name in self.columns}
        if self.prompt == "aligned":
            return Example(self.template.format(**self.shaped(values)), self.words, label, domain=self.domain)
        raw = "\n".join(value.strip() for value in values.values())
        words = () if self.prompt == "head" else tuple(f" {word.strip()}" for word in self.words)
        return Example(raw, words, label)

    def label(self, row: Row, source: str, number: int) -> int:
        """Index of the row's label."""
        return one_of(row, "label", self.labels, source, number)

    def shaped(self, values: dict[str, str]) -> dict[str, str]:
        """The columns as the template wants them."""
        return values


@dataclass
class Science(RowsTask):
    """A question, and answers that differ from row to row: the base of ARC's two tasks."""

    def example(self, row: Row, source: str, number: int) -> Example:
        """The answers' texts are the options; their letters are not shown."""
        question = text(row, "question", source, number).strip()
        answers, letters = (texts(row, path, source, number) for path in ("choices.text", "choices.label"))
        key = str(column(row, "answerKey", source, number))
        if key not in letters or len(letters) != len(answers):
            near = did_you_mean(key, letters)
            raise UserError(
                f"{source}: row {number}: answerKey must be one of {', '.join(letters)}, one for each of "
                f"{len(answers)} answers, got {key!r}.{near}"
            )
        options, label = tuple(f" {answer.strip()}" for answer in answers), letters.index(key)
        if self.prompt == "none":
            return Example(question, options, label)
        return Example(f"Question: {question}\nAnswer:", options, label, domain="Answer:")


@dataclass
class GeneratedTask(RowsTask):
    r"""A prompt and gold answers, of which the first is trained on; generation ends at :attr:`stop`.

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
