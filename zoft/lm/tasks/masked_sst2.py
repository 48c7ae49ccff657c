"""SST-2 for masked models: k rows of each label, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.examples import MASK, Piece
from zoft.lm.tasks._masked import MaskedTask


@dataclass
class MaskedSST2(MaskedTask):
    """SST-2 for masked models: sentiment of film-review sentences.

    ``{sentence} It was<mask>.`` terrible / great.

    References: Socher et al. 2013; Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    columns = ("sentence",)
    numbered = labels = ("negative", "positive")
    words = ("terrible", "great")

    train: str = "nyu-mll/glue:sst2"
    validation: str = "nyu-mll/glue:sst2"

    def pieces(self, first: str, *more: str) -> tuple[Piece, ...]:
        """The sentence as it is, with the blank at its end."""
        return (Piece(first), Piece(" It was"), MASK, Piece("."))
