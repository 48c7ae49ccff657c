"""Tasks whose label is one of a few, each with a word: the template is text with columns in braces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._fields import one_of, text
from zoft.lm.tasks._rows import RowsTask
from zoft.lm.tasks.base import PROMPTS


@dataclass
class WordsTask(RowsTask):
    """A template over text columns, and the same words to choose from in every row."""

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
