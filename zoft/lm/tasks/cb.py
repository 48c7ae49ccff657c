"""CB: does a clause hold, given the text it is embedded in? With MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class CB(WordsTask):
    r"""CB: does a clause hold, given the text it is embedded in?

    ``Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?`` Yes / No / Maybe.

    250 rows to train and choose on: 150 and 100 of them, as in MeZO's scripts.

    References: de Marneffe et al. 2019; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    columns = ("premise", "hypothesis")
    labels = ("entailment", "contradiction", "neutral")
    words = ("Yes", "No", "Maybe")
    template = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'

    num_dev: int = 100
    train: str = "aps/super_glue:cb"
    validation: str = "aps/super_glue:cb"
