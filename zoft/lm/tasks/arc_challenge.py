"""ARC-Challenge: the part of ARC's questions that simple methods fail on."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import Science


@dataclass
class ARCChallenge(Science):
    r"""ARC-Challenge: hard questions of school science, with four answers or so.

    ``Question: {question}\nAnswer:`` and the answers' texts; 1,119 rows to train and choose on: 1,000 and
    100 are taken; test rows from the test split.

    References: Clark et al. 2018 (data); Brown et al. 2020 (GPT-3, the template).
    """

    num_dev: int = 100
    train: str = "allenai/ai2_arc:ARC-Challenge"
    validation: str = "allenai/ai2_arc:ARC-Challenge:test"
