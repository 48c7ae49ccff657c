"""TREC for masked models: k rows of each kind of question, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.examples import MASK, Piece
from zoft.lm.tasks._masked import MaskedTask


@dataclass
class MaskedTREC(MaskedTask):
    """TREC for masked models: what kind of answer does a question want?

    ``<mask>: {text}`` Description / Entity / Expression / Human / Location / Number; test rows from the test split.

    Labels are the coarse ones by name (DESC, ENTY, ABBR, HUM, LOC, NUM) or numbered in that order, the order of the
    words in the published files; copies of the data on the hub number them in other orders.

    References: Li & Roth 2002; Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    columns = ("text",)
    label_column = "label_coarse_original"
    numbered = labels = ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")
    words = ("Description", "Entity", "Expression", "Human", "Location", "Number")
    first_length = 110

    train: str = "SetFit/TREC-QC"
    validation: str = "SetFit/TREC-QC::test"

    def pieces(self, first: str, *more: str) -> tuple[Piece, ...]:
        """The kind comes before the question."""
        return (MASK, Piece(":"), Piece(f" {first}", self.first_length))
