"""MNLI for masked models: k rows of each label, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._masked import MaskedPairs


@dataclass
class MaskedMNLI(MaskedPairs):
    """MNLI for masked models: does a sentence follow from another?

    ``{premise without its last character}?<mask>, {hypothesis}`` No / Yes / Maybe; test rows from
    validation_matched.

    References: Williams et al. 2018; Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    first_length = 240

    train: str = "nyu-mll/glue:mnli"
    validation: str = "nyu-mll/glue:mnli:validation_matched"
