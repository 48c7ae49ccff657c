"""COPA: which of two sentences is the cause, or the effect, of a premise? With MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._fields import one_of, text
from zoft.lm.tasks._rows import RowsTask

CONJUNCTIONS = {"effect": "so", "cause": "because"}


@dataclass
class COPA(RowsTask):
    """COPA: which of two sentences is the cause, or the effect, of a premise?

    ``{premise} so`` or ``{premise} because``, and two whole sentences to choose from.

    400 rows to train and choose on: 300 and 100 of them, as in MeZO's scripts. MeZO trains on the text of the right
    choice (``objective=cross_entropy``), not as a classification.

    References: Roemmele et al. 2011; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    published_objective: ClassVar[str] = "cross_entropy"
    """What it is trained on with ``protocol=mezo``; anything else is warned of."""

    num_dev: int = 100
    train: str = "aps/super_glue:copa"
    validation: str = "aps/super_glue:copa"

    def example(self, row: Row, source: str, number: int) -> Example:
        """The premise without its full stop, a conjunction, and the choices as its continuation."""
        premise, question, *choices = (
            text(row, name, source, number) for name in ("premise", "question", "choice1", "choice2")
        )
        label = one_of(row, "label", ("choice1", "choice2"), source, number)
        if question not in CONJUNCTIONS:
            raise UserError(f"{source}: row {number}: question must be effect or cause, got {question!r}")
        if self.prompt == "none":
            return Example(f"{premise.strip()}\n{question}", tuple(f" {choice.strip()}" for choice in choices), label)
        conjunction = CONJUNCTIONS[question]
        return Example(
            f"{premise.rstrip().removesuffix('.')} {conjunction} ",
            tuple(map(_continuing, choices)),
            label,
            domain=conjunction,
        )


def _continuing(choice: str) -> str:
    first, blank, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + blank + rest
