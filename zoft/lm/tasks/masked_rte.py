"""RTE for masked models: GLUE's version, k rows of each label, as in MeZO's RoBERTa suite."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._masked import MaskedPairs


@dataclass
class MaskedRTE(MaskedPairs):
    """RTE for masked models: does a sentence follow from a text?

    ``{sentence1 without its last character}?<mask>, {sentence2}`` Yes / No.

    References: Wang et al. 2018 (GLUE); Gao et al. 2021 (LM-BFF, template and sampling); Malladi et al. 2023 (MeZO).
    """

    columns = ("sentence1", "sentence2")
    numbered = labels = ("entailment", "not_entailment")
    words = ("Yes", "No")
    first_length = 240

    train: str = "nyu-mll/glue:rte"
    validation: str = "nyu-mll/glue:rte"
