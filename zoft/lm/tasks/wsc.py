"""WSC: does a pronoun refer to this noun? SuperGLUE's wsc.fixed, with MeZO's template, sampling and splits."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask

log = logging.getLogger(__name__)


@dataclass
class WSC(WordsTask):
    r"""WSC: does a pronoun refer to this noun?

    ``{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?`` and on
    a line of its own No / Yes.

    There are 554 rows to train and choose on. MeZO's script gives dev 500 of them and trains on 54; ``protocol=mezo``
    follows it and says so. The default gives dev 100.

    Args:
        num_dev: rows the best checkpoint is chosen by; by default 100 where it would be more than half of the rows.

    References: Levesque et al. 2012; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    columns = ("text", "span1_text", "span2_text")
    labels = ("False", "True")
    words = ("No", "Yes")
    template = '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'

    train: str = "aps/super_glue:wsc.fixed"
    validation: str = "aps/super_glue:wsc.fixed"

    def shaped(self, values: dict[str, str]) -> dict[str, str]:
        """The pronoun in small letters, also where it begins the sentence."""
        return values | {"span2_text": values["span2_text"].lower()}

    def dev_of_few(self, size: int) -> int:
        """Enough to choose by, and most rows to train on."""
        num_dev = min(100, size // 2)
        log.warning(
            f"{self.train} has {size} rows: {num_dev} are chosen by and {size - num_dev} trained on "
            f"(as published, task.protocol=mezo: {self.num_dev} and {max(0, size - self.num_dev)})"
        )
        return num_dev
