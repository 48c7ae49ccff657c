"""The base of ARC's two tasks: a question, and answers that differ from row to row."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row, column
from zoft.lm.tasks._fields import text, texts
from zoft.lm.tasks._rows import RowsTask


@dataclass
class Science(RowsTask):
    """A question and its possible answers."""

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
