"""SST-2: sentiment of film-review sentences, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class SST2(WordsTask):
    r"""SST-2: sentiment of film-review sentences.

    ``{sentence} It was`` terrible / great.

    References: Socher et al. 2013; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    columns = ("sentence",)
    labels = ("negative", "positive")
    words = (" terrible", " great")
    template = "{sentence} It was"
    domain = "It was"

    train: str = "nyu-mll/glue:sst2"
    validation: str = "nyu-mll/glue:sst2"

    def shaped(self, values: dict[str, str]) -> dict[str, str]:
        """Sentences come with a blank at their end."""
        return {"sentence": values["sentence"].strip()}
