"""SST-5 for masked models: k rows of each label, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.examples import MASK, Piece
from zoft.lm.tasks._masked import MaskedTask


@dataclass
class MaskedSST5(MaskedTask):
    """SST-5 for masked models: five degrees of sentiment.

    ``{text} It was<mask>.`` terrible / bad / okay / good / great; test rows from the test split.

    References: Socher et al. 2013; Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    columns = ("text",)
    numbered = labels = ("very negative", "negative", "neutral", "positive", "very positive")
    words = ("terrible", "bad", "okay", "good", "great")
    first_length = 110

    train: str = "SetFit/sst5"
    validation: str = "SetFit/sst5::test"

    def pieces(self, first: str, *more: str) -> tuple[Piece, ...]:
        """The sentence as it is."""
        return (Piece(first, self.first_length), Piece(" It was"), MASK, Piece("."))
