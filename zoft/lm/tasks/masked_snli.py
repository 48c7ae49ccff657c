"""SNLI for masked models: k rows of each label, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.files import Row
from zoft.lm.tasks._masked import MaskedPairs


@dataclass
class MaskedSNLI(MaskedPairs):
    """SNLI for masked models: does a caption follow from another?

    ``{premise without its last character}?<mask>, {hypothesis}`` No / Yes / Maybe.

    Rows on which the annotators did not agree (label -1 on the hub, - in the original files) take no part.

    References: Bowman et al. 2015; Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    train: str = "stanfordnlp/snli"
    validation: str = "stanfordnlp/snli"

    def keeps(self, row: Row) -> bool:
        """Only rows with a label."""
        return str(row.get(self.label_column)) not in ("-1", "-")
