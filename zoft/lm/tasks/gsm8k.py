"""GSM8K: school arithmetic in words; the model writes a solution that ends in ``#### number``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._answers import GeneratedTask
from zoft.lm.tasks._fields import text

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass
class GSM8K(GeneratedTask):
    r"""GSM8K: school arithmetic in words; solutions are generated.

    ``Question: {question}\nAnswer:`` and a solution of several lines; scored by its last number, exactly.

    References: Cobbe et al. 2021 (data). The template is zoft's own.
    """

    metric = "exact_match"
    stop = "\n\n"

    max_new_tokens: int = 256
    train: str = "openai/gsm8k:main"
    validation: str = "openai/gsm8k:main:test"

    def example(self, row: Row, source: str, number: int) -> Example:
        """The whole solution is trained on; the number behind ``####`` is what counts."""
        question, solution = (text(row, name, source, number).strip() for name in ("question", "answer"))
        _, mark, final = solution.rpartition("####")
        if not mark or not NUMBER.search(final):
            raise UserError(f"{source}: row {number}: answer must end in '#### number', got {solution[-40:]!r}")
        prompt = question if self.prompt == "none" else f"Question: {question}\nAnswer:"
        return self.answered(prompt, solution, [self.answer_in(solution)])

    def answer_in(self, generated: str) -> str:
        r"""The number behind ``####``, else the last number; without commas and a trailing ``.0``; empty if none.

        Example:
            >>> GSM8K().answer_in(" 3 * 400 = 1200\n#### 1,200\n\nQuestion: 7?")
            '1200'
        """
        solution = generated.partition(self.stop)[0]
        _, mark, final = solution.rpartition("####")
        numbers = NUMBER.findall(final) if mark else NUMBER.findall(solution)[-1:]
        number = numbers[0].replace(",", "") if numbers else ""
        return number.rstrip("0").rstrip(".") if "." in number else number
