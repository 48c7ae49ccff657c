"""MultiRC: is this an answer to the question about a paragraph? With MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class MultiRC(WordsTask):
    r"""MultiRC: is this an answer to the question about a paragraph?

    ``{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?`` No / Yes.

    A row is one answer, and the metric is the accuracy over answers as in MeZO, not the benchmark's F1a and EM.

    References: Khashabi et al. 2018; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    columns = ("paragraph", "question", "answer")
    labels = ("False", "True")
    words = ("No", "Yes")
    template = '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'

    train: str = "aps/super_glue:multirc"
    validation: str = "aps/super_glue:multirc"
