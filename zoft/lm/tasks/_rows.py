"""What tasks of rows share: where rows come from, which are taken (MeZO's sampler), and how their text is trimmed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoft.errors import UserError
from zoft.lm.data.examples import Example
from zoft.lm.data.files import ASSET, SUFFIXES, Row, read_rows
from zoft.lm.tasks.base import NO_ROWS, NewRow, Splits, Task

log = logging.getLogger(__name__)

PROTOCOLS = ("default", "mezo")


@dataclass
class RowsTask(Task):
    """Train and dev rows from one source, test rows from another, by MeZO's sampler.

    Args:
        num_train: rows to train on; fewer where the source has fewer.
        num_dev: rows the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on; fewer where the source has fewer.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut.
        prompt: aligned (the template that makes the task a continuation), none (raw text and answers only), or head
            (raw text for a fresh classification head).
        protocol: default (dev takes half of the rows at most) or mezo (as published: dev takes num_dev rows first, and
            what is left is trained on).
        train: hub name (``name:subset:split``), or a local file or ``zoft:NAME`` with the hub's columns.
        validation: the same for the held-out rows.
    """

    prompts: ClassVar[tuple[str, ...]] = ("aligned", "none")
    """What ``prompt`` may be; head needs the same few labels in every row."""

    prompt: str = "aligned"
    protocol: str = "default"
    train: str = ""
    validation: str = ""

    def check(self) -> None:
        """Refuse a prompt that the task has no form for, an unknown protocol, and held-out rows trained on."""
        super().check()
        why = "its answers differ from row to row, a head has none for them" * (self.prompt == "head")
        self.require(self.prompt in self.prompts, "prompt", f"one of {', '.join(self.prompts)}", why)
        self.require(self.protocol in PROTOCOLS, "protocol", f"one of {', '.join(PROTOCOLS)}")
        one_split = self.train.startswith(ASSET) or Path(self.train).suffix.lower() in SUFFIXES
        self.require(not one_split or self.train != self.validation, "validation", "another file than train")

    @property
    def kind(self) -> str:
        """Options are ranked, unless a head is wanted."""
        return "head" if self.prompt == "head" else "options"

    def load(self) -> Splits:
        """Read both sources and take the rows that the seed says.

        Raises:
            UserError: a source that cannot be read, or a row that lacks a column or has an unknown label
                (``source: row N``).
        """
        rows, held = self.rows(self.train, "train"), self.rows(self.validation, "validation")
        order = permutation(len(rows), self.data_seed)[: self.num_train + self.num_dev]
        num_train = len(order) - self._num_dev(len(order))
        self.say_if_fewer(num_train)
        test = permutation(len(held), self.data_seed)[: self.num_test]
        return Splits(
            train=self._examples(rows, order[:num_train], self.train),
            dev=self._examples(rows, order[num_train:], self.train),
            test=self._examples(held, test, self.validation),
        )

    def demonstrations(self, num_eval: int, num: int = 32) -> list[list[Example]]:
        """A set of solved rows for each of ``num_eval`` rows to solve, as MeZO's in-context learning draws them.

        Set i is the first ``num`` rows of a permutation under the i-th of the numbers below 10,000 that seed 0 gives.
        """
        import numpy

        rows = self.rows(self.train, "train")
        seeds = numpy.random.RandomState(0).randint(0, 10_000, num_eval).tolist()
        return [self._examples(rows, permutation(len(rows), seed)[:num], self.train) for seed in seeds]

    def rows(self, source: str, split: str) -> list[tuple[int, Row]]:
        """The source's rows, each with its number, without those that have no label at all."""
        if not source and split == "train":
            raise UserError(NO_ROWS)
        self.require(bool(source), "validation", "a data file or hub dataset")
        return [(number, row) for number, row in enumerate(read_rows(source, split), start=1) if self.keeps(row)]

    def keeps(self, row: Row) -> bool:
        """Whether the row takes part."""
        return True

    def example(self, row: Row, source: str, number: int) -> Example:
        """The row as the model reads it; ``source`` and ``number`` say where it stands."""
        raise NotImplementedError

    def for_new_rows(self) -> tuple[NewRow, tuple[str, ...]]:
        """Rows with the hub's columns but the label."""
        known: dict[str, Any] = {"label": 0, "answers": {"text": ["?"]}, "answer": "?"}

        def example_of(row: Mapping[str, Any], where: str) -> Example:
            source, _, number = where.rpartition(":")
            return trimmed(self.example({**known, **row}, source or where, int(number) if number.isdecimal() else 0))

        return example_of, tuple(getattr(self, "labels", ()))

    def _examples(self, rows: list[tuple[int, Row]], picked: list[int], source: str) -> list[Example]:
        return [trimmed(self.example(rows[index][1], source, rows[index][0])) for index in picked]

    def dev_of_few(self, size: int) -> int:
        """How many rows dev gets of ``size`` where num_dev is more than half of them; an error unless a task knows."""
        raise UserError(
            f"{self.train} has {size} rows: with task.num_dev={self.num_dev} fewer would be trained on than chosen by; "
            "lower task.num_dev, or take them as published with task.protocol=mezo"
        )

    def _num_dev(self, size: int) -> int:
        """How many of the ``size`` rows taken are for dev; as published, dev is served first."""
        if self.num_train + self.num_dev <= size or self.num_dev <= size // 2:
            return self.num_dev
        if self.protocol == "default":
            return self.dev_of_few(size)
        if self.num_dev >= size:
            raise UserError(f"{self.train} has {size} rows: none is left to train on with task.num_dev={self.num_dev}")
        log.warning(
            f"task.protocol=mezo: dev takes {self.num_dev} of the {size} rows of {self.train} as in the published "
            f"script, and {size - self.num_dev} are left to train on"
        )
        return self.num_dev


def permutation(size: int, seed: int) -> list[int]:
    """The order that ``numpy.random.seed(seed)`` and ``permutation(size)`` give; global state is left alone.

    Example:
        >>> permutation(67_349, 0)[:3]  # MeZO's first rows of SST-2
        [43787, 16159, 59015]
    """
    import numpy

    return numpy.random.RandomState(seed).permutation(size).tolist()


def trimmed(example: Example) -> Example:
    """Whitespace as MeZO has it: none before the text, no blank behind it, and an option's blank is the option's.

    Example:
        >>> example = trimmed(Example("It rained so ", ("we stayed. ", "I left."), 0))
        >>> example.prompt, example.options
        ('It rained so', (' we stayed.', ' I left.'))
    """
    prompt = example.prompt.lstrip().rstrip(" ")
    whole = [(example.prompt + option).lstrip().rstrip(" ") for option in example.options]
    return dataclasses.replace(example, prompt=prompt, options=tuple(text[len(prompt) :] for text in whole))
