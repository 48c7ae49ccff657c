"""WinoGrande: which of two names fills the blank in a sentence?"""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row, column
from zoft.lm.tasks._fields import text
from zoft.lm.tasks._rows import RowsTask


@dataclass
class WinoGrande(RowsTask):
    """WinoGrande: which of two names fills the blank in a sentence?

    The sentence up to its blank; an option is a name and the rest of the sentence.

    The names differ in length and the rest is what tells them apart, so an option is scored to the sentence's end.

    References: Sakaguchi et al. 2020 (data). The template is zoft's own; MeZO's repository has one that scores whole
    sentences and is in none of its tables.
    """

    train: str = "allenai/winogrande:winogrande_xl"
    validation: str = "allenai/winogrande:winogrande_xl"

    def example(self, row: Row, source: str, number: int) -> Example:
        """The blank is an underscore."""
        sentence, *names = (text(row, name, source, number).strip() for name in ("sentence", "option1", "option2"))
        answer = str(column(row, "answer", source, number))
        if answer not in ("1", "2"):
            raise UserError(f"{source}: row {number}: answer must be 1 or 2, got {answer!r}")
        before, blank, after = sentence.partition("_")
        if not blank:
            raise UserError(f"{source}: row {number}: sentence has no blank (_), got {sentence[:60]!r}")
        if self.prompt == "none":
            return Example(sentence, tuple(f" {name}" for name in names), int(answer) - 1)
        return Example(before, tuple(f"{name}{after}" for name in names), int(answer) - 1)
