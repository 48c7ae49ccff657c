"""WiC: has a word the same meaning in two sentences? With MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class WiC(WordsTask):
    r"""WiC: has a word the same meaning in two sentences?

    ``Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}`` and on a
    line of its own No / Yes.

    References: Pilehvar & Camacho-Collados 2019; Malladi et al. 2023 (MeZO), Table 14; its published
        sampler.
    """

    columns = ("sentence1", "sentence2", "word")
    labels = ("False", "True")
    words = ("No", "Yes")
    template = (
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
    )

    train: str = "aps/super_glue:wic"
    validation: str = "aps/super_glue:wic"
