"""AG News: which of four topics is a news item about?"""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.tasks._answers import WordsTask


@dataclass
class AGNews(WordsTask):
    r"""AG News: which of four topics is a news item about?

    ``Article: {text}\nTopic:`` World / Sports / Business / Technology; test rows from the test split.

    References: Zhang et al. 2015 (data). The template is zoft's own.
    """

    columns = ("text",)
    labels = ("World", "Sports", "Business", "Sci/Tech")
    words = (" World", " Sports", " Business", " Technology")
    template = "Article: {text}\nTopic:"
    domain = "Topic:"

    train: str = "fancyzhx/ag_news"
    validation: str = "fancyzhx/ag_news::test"

    def shaped(self, values: dict[str, str]) -> dict[str, str]:
        """Some items have blanks around them."""
        return {"text": values["text"].strip()}
