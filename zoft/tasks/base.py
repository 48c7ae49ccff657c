"""What every task promises: examples as a prompt, its options and the gold one, in three disjoint splits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from zoft.component import Component
from zoft.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One labelled text as the model reads it.

    Args:
        prompt: what comes before the answer.
        options: the answers to choose from, each with its leading space.
        label: index of the right one.
    """

    prompt: str
    options: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Splits:
    """Three disjoint lists: trained on, chosen by, reported on."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]


@dataclass
class Task(Component):
    """A dataset with its template and answers.

    Args:
        num_train: rows to train on.
        num_dev: rows the best checkpoint is chosen by.
        num_test: held-out rows that the reported metric is computed on.
        data_seed: which rows go where; the run's seed does not change them.
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut.
    """

    num_train: int = 1000
    num_dev: int = 500
    num_test: int = 1000
    data_seed: int = 0
    max_length: int = 2048

    def check(self) -> None:
        """Refuse empty splits, a length that holds no prompt, and a seed that the samplers do not take."""
        for field in ("num_train", "num_dev", "num_test"):
            self.require(getattr(self, field) >= 1, field, "at least 1")
        self.require(self.max_length >= 8, "max_length", "at least 8")
        self.require(self.data_seed >= 0, "data_seed", "0 or more")

    def load(self) -> Splits:
        """Read the data and cut it into splits.

        Raises:
            UserError: a file that is not there or cannot be read, naming the place and the mend.
        """
        raise NotImplementedError

    def balanced(self, by_label: dict[int, list[Example]], counts: Sequence[int]) -> list[list[Example]]:
        """Disjoint splits of ``counts`` rows with every label equally frequent in each (up to rounding).

        Args:
            by_label: the rows of each label, in the file's order.
            counts: rows wanted in each split; the first splits are served first.
        """
        generator = random.Random(self.data_seed)
        pools = {label: _shuffled(rows, generator) for label, rows in sorted(by_label.items())}
        splits = []
        for count in counts:
            chosen: list[Example] = []
            for position, (label, pool) in enumerate(pools.items()):
                share = count // len(pools) + (position < count % len(pools))
                if share > len(pool):
                    raise UserError(
                        f"task={self.name()} has too few rows with label {label}: {share} more wanted, "
                        f"{len(pool)} left; lower task.num_train, task.num_dev or task.num_test"
                    )
                chosen += pool[:share]
                del pool[:share]
            splits.append(_shuffled(chosen, generator))
        return splits


def _shuffled(rows: Sequence[T], generator: random.Random) -> list[T]:
    rows = list(rows)
    generator.shuffle(rows)
    return rows
