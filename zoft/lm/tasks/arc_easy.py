"""ARC-Easy: the part of ARC's questions that simple methods answer too."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import Science


@dataclass
class ARCEasy(Science):
    r"""ARC-Easy: easy questions of school science, with four answers or so.

    ``Question: {question}\nAnswer:`` and the answers' texts; 2,251 rows to train and choose on; test rows
    from the test split.

    References: Clark et al. 2018 (data); Brown et al. 2020 (GPT-3, the template).
    """

    train: str = "allenai/ai2_arc:ARC-Easy"
    validation: str = "allenai/ai2_arc:ARC-Easy:test"
