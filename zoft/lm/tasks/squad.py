"""SQuAD 1.1: questions about a paragraph, with MeZO's template, sampling and splits."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.lm.data.examples import Example
from zoft.lm.data.files import Row
from zoft.lm.tasks._answers import GeneratedTask
from zoft.lm.tasks._fields import text, texts


@dataclass
class SQuAD(GeneratedTask):
    r"""SQuAD 1.1: questions about a paragraph; answers are generated.

    ``Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:``, answered in one line.

    References: Rajpurkar et al. 2016; Malladi et al. 2023 (MeZO), Table 14 (template); its published sampler.
    """

    train: str = "rajpurkar/squad"
    validation: str = "rajpurkar/squad"

    def example(self, row: Row, source: str, number: int) -> Example:
        """The first gold answer is the one that is trained on."""
        title, context, question = (text(row, name, source, number) for name in ("title", "context", "question"))
        answers = texts(row, "answers.text", source, number)
        prompt = f"Title: {title}\nContext: {context}\nQuestion: {question.strip()}\nAnswer:"
        if self.prompt == "none":
            prompt = f"{title.strip()}\n{context.strip()}\n{question.strip()}"
        return self.answered(prompt, answers[0], answers)
