"""Tasks for masked language models: k rows of each label, and a word in place of the mask (MeZO's RoBERTa suite)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError
from zoft.lm.data.examples import MASK, Example, Piece
from zoft.lm.data.files import Row
from zoft.lm.tasks._fields import one_of, text
from zoft.lm.tasks._rows import RowsTask, permutation
from zoft.lm.tasks.base import Splits

log = logging.getLogger(__name__)

TEST_SEED = 42
"""Draws the held-out rows where there are more than wanted, the same ones for every data_seed."""


@dataclass
class MaskedTask(RowsTask):
    """k rows of each label to train on, the next k to choose by; the published seeds are 13, 21, 42, 87 and 100.

    Args:
        num_train: rows of each label to train on; 16 or 512 in the published tables.
        num_dev: rows of each label the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on; fewer where the source has fewer.
        max_length: tokens kept of a text; the end of longer ones is cut.
        protocol: default (a label with too few rows is an error) or mezo (as published: it then has fewer).
    """

    prompts = ("aligned", "none", "head")

    columns: ClassVar[tuple[str, ...]] = ()
    """One or two text columns."""

    label_column: ClassVar[str] = "label"
    numbered: ClassVar[tuple[str, ...]] = ()
    """Names of the labels in the order of the hub's numbers."""

    labels: ClassVar[tuple[str, ...]] = ()
    """The same names in the order of the words."""

    words: ClassVar[tuple[str, ...]] = ()
    first_length: ClassVar[int] = 0
    """Tokens kept of the first text (its first ones); 0 keeps all."""

    num_train: int = 16
    num_dev: int = 16
    data_seed: int = 13
    max_length: int = 128

    @property
    def kind(self) -> str:
        """Words at the mask are ranked, unless a head is wanted."""
        return "head" if self.prompt == "head" else "mask"

    def load(self) -> Splits:
        """Shuffle under the seed, take each label's first rows, labels in the order in which they first appear."""
        rows, held = self.rows(self.train, "train"), self.rows(self.validation, "validation")
        pools: dict[int, list[int]] = {}
        for index in permutation(len(rows), self.data_seed):
            pools.setdefault(self.label(rows[index][1], self.train, rows[index][0]), []).append(index)
        self._check_pools(pools)
        end = self.num_train + self.num_dev
        test = list(range(len(held)))
        if len(held) > self.num_test:
            test = permutation(len(held), TEST_SEED)[: self.num_test]
        return Splits(
            train=self._masked(rows, [i for pool in pools.values() for i in pool[: self.num_train]], self.train),
            dev=self._masked(rows, [i for pool in pools.values() for i in pool[self.num_train : end]], self.train),
            test=self._masked(held, test, self.validation),
        )

    def label(self, row: Row, source: str, number: int) -> int:
        """Index of the row's label among the words."""
        place = one_of(row, self.label_column, self.numbered, source, number, named=True)
        return self.labels.index(self.numbered[place])

    def example(self, row: Row, source: str, number: int) -> Example:
        """The template's pieces; raw text and the mask; or raw text for a head."""
        label = self.label(row, source, number)
        first, *more = (text(row, name, source, number) for name in self.columns)
        words = tuple(f" {word}" for word in self.words)
        if self.prompt == "aligned":
            return Example("", words, label, pieces=self.pieces(first, *more))
        raw = (Piece(first, self.first_length), *(Piece(f" {other}" if words else other) for other in more))
        if self.prompt == "head":
            return Example("", (), label, pieces=(raw[0], *map(Piece, more)))
        return Example("", words, label, pieces=(*raw, MASK))

    def pieces(self, first: str, *more: str) -> tuple[Piece, ...]:
        """The template, in the parts that are encoded one by one."""
        raise NotImplementedError

    def demonstrations(self, num_eval: int, num: int = 32) -> list[list[Example]]:
        """None: this suite is published without in-context learning."""
        raise UserError(f"task={self.name()} has no demonstrations: choose a task for causal models (zoft ls task)")

    def _masked(self, rows: list[tuple[int, Row]], picked: list[int], source: str) -> list[Example]:
        return [self.example(rows[index][1], source, rows[index][0]) for index in picked]

    def _check_pools(self, pools: dict[int, list[int]]) -> None:
        for label, name in enumerate(self.labels):
            num_rows, wanted = len(pools.get(label, ())), self.num_train + self.num_dev
            if num_rows >= wanted:
                continue
            said = f"{self.train} has {num_rows} rows labelled {name}, {self.num_train} + {self.num_dev} are wanted"
            if self.protocol == "default":
                raise UserError(f"{said}: lower task.num_train or task.num_dev, or take fewer with task.protocol=mezo")
            log.warning(f"{said}: it has fewer in train or dev")


@dataclass
class MaskedPairs(MaskedTask):
    """Two sentences, and whether the second follows: ``{first without its last character}?<mask>, {second}``."""

    numbered: ClassVar[tuple[str, ...]] = ("entailment", "neutral", "contradiction")
    labels: ClassVar[tuple[str, ...]] = ("contradiction", "entailment", "neutral")
    words: ClassVar[tuple[str, ...]] = ("No", "Yes", "Maybe")
    columns: ClassVar[tuple[str, ...]] = ("premise", "hypothesis")

    max_length: int = 256

    def pieces(self, first: str, *more: str) -> tuple[Piece, ...]:
        """The second sentence begins with a small letter."""
        second = more[0][:1].lower() + more[0][1:]
        return (Piece(first[:-1], self.first_length), Piece("?"), MASK, Piece(","), Piece(f" {second}"))
