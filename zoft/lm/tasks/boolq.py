"""BoolQ: yes-or-no questions about a passage, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.data.files import Row, column
from zoft.lm.tasks._answers import WordsTask


@dataclass
class BoolQ(WordsTask):
    r"""BoolQ: a question about a passage, yes or no.

    ``{passage} {question}?`` and on the next line Yes / No; the question gets a capital letter.

    References: Clark et al. 2019; Malladi et al. 2023 (MeZO), Table 14 (template, version 2); its published sampler.
    """

    columns = ("passage", "question")
    labels = ("true", "false")
    words = ("Yes", "No")
    template = "{passage} {question}\n"

    train: str = "google/boolq"
    validation: str = "google/boolq"

    def shaped(self, values: dict[str, str]) -> dict[str, str]:
        """The question as a sentence: the hub's have no capital letter and no question mark."""
        question = values["question"].removesuffix("?") + "?"
        return values | {"question": question[0].upper() + question[1:]}

    def label(self, row: Row, source: str, number: int) -> int:
        """0 for true: Yes comes first, while in the data true is 1."""
        answer = str(column(row, "answer", source, number)).lower()
        if answer not in ("true", "false", "1", "0"):
            raise UserError(f"{source}: row {number}: answer must be true or false, got {row['answer']!r}")
        return int(answer in ("false", "0"))
