"""The objective that rows of such a format are usually trained on."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.objectives.base import Objective


@dataclass
class Auto(Objective):
    """What the format of the rows asks for.

    options for labels and choices, cross_entropy for completions, chats and generated answers, preference for pairs,
    reward for rewards, label_words for words at a mask, classes for a head. The choice is made once the rows are read
    (:func:`zoft.lm.formats.settled`); from then on the run has that objective and not this one.
    """
