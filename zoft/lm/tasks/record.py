"""ReCoRD: which entity of a news text is missing in a sentence about it? With MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._fields import text, texts
from zoft.lm.tasks._rows import RowsTask


@dataclass
class ReCoRD(RowsTask):
    r"""ReCoRD: which entity of a news text is missing in a sentence about it?

    ``{passage}\n-`` with its highlights as a list, and the sentence with each entity filled in as its next item.

    Several entities may be right: the first gold one is trained on, any of them counts. MeZO trains on the text of the
    right option (``objective=cross_entropy``), not as a classification.

    References: Zhang et al. 2018; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    published_objective: ClassVar[str] = "cross_entropy"
    """What it is trained on with ``protocol=mezo``; anything else is warned of."""

    train: str = "aps/super_glue:record"
    validation: str = "aps/super_glue:record"

    def example(self, row: Row, source: str, number: int) -> Example:
        """A whole sentence is an option."""
        passage, query = (text(row, name, source, number) for name in ("passage", "query"))
        entities, answers = (texts(row, name, source, number) for name in ("entities", "answers"))
        missing = next((answer for answer in answers if answer not in entities), None)
        if missing is not None:
            raise UserError(f"{source}: row {number}: the answer {missing!r} is none of its entities")
        label, *others = dict.fromkeys(map(entities.index, answers))
        if self.prompt == "none":
            prompt, options = f"{passage.strip()}\n{query.strip()}", [f" {entity}" for entity in entities]
            return Example(prompt, tuple(options), label, tuple(others))
        return Example(
            passage.replace("@highlight\n", "- ") + "\n-",
            tuple(" " + query.replace("@placeholder", entity) for entity in entities),
            label,
            tuple(others),
            domain="-",
        )
