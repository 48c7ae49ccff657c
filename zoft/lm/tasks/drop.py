"""DROP: questions that take counting and comparing in a passage, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._answers import GeneratedTask
from zoft.lm.tasks._fields import text, texts


@dataclass
class DROP(GeneratedTask):
    r"""DROP: questions that take counting and comparing in a passage; answers are generated.

    ``Passage: {passage}\nQuestion: {question}\nAnswer:``, answered in one line.

    References: Dua et al. 2019; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    train: str = "ucinlp/drop"
    validation: str = "ucinlp/drop"

    def example(self, row: Row, source: str, number: int) -> Example:
        """The first gold answer is the one that is trained on."""
        passage, question = (text(row, name, source, number) for name in ("passage", "question"))
        answers = texts(row, "answers_spans.spans", source, number)
        prompt = f"Passage: {passage}\nQuestion: {question.strip()}\nAnswer:"
        if self.prompt == "none":
            prompt = f"{passage.strip()}\n{question.strip()}"
        return self.answered(prompt, answers[0], answers)
