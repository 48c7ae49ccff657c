"""RTE: SuperGLUE's version, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class RTE(WordsTask):
    r"""RTE: does a sentence follow from a text?

    ``{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?`` Yes / No.

    References: Wang et al. 2019 (SuperGLUE); Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    columns = ("premise", "hypothesis")
    labels = ("entailment", "not_entailment")
    words = ("Yes", "No")
    template = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'

    train: str = "aps/super_glue:rte"
    validation: str = "aps/super_glue:rte"
