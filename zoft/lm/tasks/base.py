"""What every task promises: rows as a model reads them, with their right answers, in three disjoint splits."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from zoft.component import Component
from zoft.errors import UserError
from zoft.lm.data.examples import Example

log = logging.getLogger(__name__)
T = TypeVar("T")
NewRow = Callable[[Mapping[str, Any], str], Any]
"""(row, its place) -> the example without a known answer."""

NO_ROWS = "there are no rows to train on: set task.train=FILE, or a data set of the hub"
PROMPTS = ("aligned", "none", "head")
"""What a task's ``prompt`` may be: its template, the raw text and the words, the raw text for a classification head."""


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
        max_length: tokens kept of a prompt and its option; the beginning of longer ones is cut. 0: all that the model
            takes.
    """

    metric: ClassVar[str] = "accuracy"
    """What is reported: accuracy, f1 or exact_match."""

    separator: ClassVar[str] = "\n\n"
    """What stands between demonstrations."""

    num_train: int = 1000
    num_dev: int = 500
    num_test: int = 1000
    data_seed: int = 0
    max_length: int = 2048

    def check(self) -> None:
        """Refuse empty splits, a length that holds no prompt, and a seed that the samplers do not take."""
        for field in ("num_train", "num_dev", "num_test"):
            self.require(getattr(self, field) >= 1, field, "at least 1")
        self.require(self.max_length >= 8 or not self.max_length, "max_length", "at least 8, or 0 (the model's limit)")
        self.require(0 <= self.data_seed < 2**32, "data_seed", "0 or more and below 2**32")

    @property
    def kind(self) -> str:
        """What its rows ask of a model: a key of :data:`zoft.lm.formats.FORMS`."""
        return "options"

    def load(self) -> Splits:
        """Read the data and cut it into splits.

        Raises:
            UserError: a file that is not there or cannot be read, naming the place and the mend.
        """
        raise NotImplementedError

    def for_new_rows(self) -> tuple[NewRow, tuple[str, ...]]:
        """How rows without answers are read: ((row, place) -> example, the names of the answers).

        The example's ``label`` means nothing. Without names the answers are each example's own options.

        Raises:
            UserError: the task's rows have no answer to be found.
        """
        raise UserError(f"task={self.name()} has no reader of new rows: predict with a run of another task")

    def say_if_fewer(self, num_rows: int) -> None:
        """Note that there are fewer training rows than ``num_train`` asks for."""
        if num_rows < self.num_train != type(self).__dataclass_fields__["num_train"].default:
            log.warning("task.num_train=%s, and %s rows are there to train on", f"{self.num_train:,}", f"{num_rows:,}")

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


def with_demonstrations(example: Example, shown: Sequence[Example], separator: str = Task.separator) -> Example:
    r"""The example behind solved ones, for in-context learning.

    Example:
        >>> solved = Example("1 + 1 =", (" 3", " 2"), 1)
        >>> with_demonstrations(Example("2 + 2 =", (" 4", " 5"), 0), [solved]).prompt
        '1 + 1 = 2\n\n2 + 2 ='

    References: Malladi et al. 2023 (MeZO), the published `encode_prompt`.
    """
    if not shown:
        return example
    solved = separator.join((one.prompt + one.options[one.label]).strip() for one in shown).strip()
    return dataclasses.replace(
        example, prompt=solved + separator + example.prompt, domain=solved + separator + example.domain
    )


def uncontextual(example: Example) -> Example:
    """The same options behind the prompt that lacks the row's content: what calibration divides by.

    Example:
        >>> uncontextual(Example("a dull film It was", (" terrible", " great"), 0, domain="It was")).prompt
        'It was'

    References: Holtzman et al. 2021 (surface-form competition).
    """
    return dataclasses.replace(example, prompt=example.domain)


def _shuffled(rows: Sequence[T], generator: random.Random) -> list[T]:
    rows = list(rows)
    generator.shuffle(rows)
    return rows
