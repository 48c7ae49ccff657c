"""Your own labelled text: one file, a template, and a word for each label."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

from zoft.data.files import column, read_rows
from zoft.errors import UserError, did_you_mean
from zoft.tasks.base import Example, Splits, Task


@dataclass
class Custom(Task):
    r"""Rows of a file or hub dataset, a template over their columns, and an answer word for each label.

    Without ``validation`` the held-out rows are taken from ``train``, which is then cut into three disjoint parts.

    Args:
        num_train: rows to train on; fewer where the file has fewer.
        num_dev: rows the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on; fewer where the file has fewer.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut.
        train: a json, jsonl, csv, tsv or parquet file, or a hub name (``name:subset``).
        validation: the same for held-out rows; empty takes them from ``train``.
        label: the column that holds the label.
        template: the prompt, with columns in braces, e.g. ``{text}\nIs this spam? Answer:``.
        words: label -> answer word, e.g. ``{ham: No, spam: Yes}``.
    """

    num_train: int = 1000
    num_dev: int = 100
    num_test: int = 500
    train: str = ""
    validation: str = ""
    label: str = "label"
    template: str = ""
    words: dict[Any, str] = field(default_factory=dict)

    def load(self) -> Splits:
        """Read, check every row, and cut."""
        self.require(bool(self.train), "train", "a data file or hub dataset")
        self.require(bool(self.template), "template", "the prompt, with columns in braces, e.g. '{text} It was'")
        self.require(len(self.words) >= 2, "words", "a word for each label, e.g. '{0: terrible, 1: great}'")
        pool = self._shuffled_examples(self.train, "train")
        if self.validation:
            test = self._shuffled_examples(self.validation, "validation")[: self.num_test]
        else:
            test, pool = pool[: self.num_test], pool[self.num_test :]
        dev, train = pool[: self.num_dev], pool[self.num_dev :][: self.num_train]
        if not train or not dev:
            raise UserError(
                f"{self.train} has too few rows for num_test={self.num_test} and num_dev={self.num_dev} "
                "with something left to train on: lower them, or give task.validation"
            )
        return Splits(train=train, dev=dev, test=test)

    def _shuffled_examples(self, source: str, split: str) -> list[Example]:
        import random

        words = {str(label): word for label, word in self.words.items()}
        options = tuple(f" {str(word).strip()}" for word in words.values())
        pieces = self._pieces()
        examples = []
        for number, row in enumerate(read_rows(source, split), start=1):
            label = str(column(row, self.label, source, number))
            if label not in words:
                raise UserError(f"{source}: row {number}: label {label!r} has no word.{did_you_mean(label, words)}")
            prompt = "".join(
                text + ("" if name is None else str(column(row, name, source, number)).strip()) for text, name in pieces
            )
            examples.append(Example(prompt, options, list(words).index(label)))
        random.Random(self.data_seed).shuffle(examples)
        return examples

    def _pieces(self) -> list[tuple[str, str | None]]:
        """(text, the column behind it) through the template; ``str.format`` would reach attributes of the values."""
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(
                f"custom.template={self.template!r} is broken: {error}; a brace itself is {{{{ or }}}}"
            ) from None
        if not any(name for _, name, _, _ in parsed) or any(name == "" or spec or how for _, name, spec, how in parsed):
            raise UserError(
                f"custom.template={self.template!r} must hold columns in braces and nothing else in them, "
                "e.g. '{text} It was'"
            )
        return [(text, name) for text, name, _, _ in parsed]
