"""Solved rows shown before each row to solve: in-context learning."""

from __future__ import annotations

from collections.abc import Sequence

from zoft.errors import UserError
from zoft.tasks._rows import RowsTask, permutation
from zoft.tasks.base import Example, Task, with_demonstrations


def with_solved(task: Task, examples: Sequence[Example], train: Sequence[Example], k: int) -> list[Example]:
    """Every example behind ``k`` solved ones, another set for each, drawn as MeZO draws them.

    A published task draws from all rows of its training source, your own from the rows that it trains on.

    Args:
        task: where they come from.
        examples: held-out rows.
        train: the rows that are trained on.
        k: how many are shown.

    Raises:
        UserError: there are fewer than ``k``.
    """
    if isinstance(task, RowsTask):
        shown = task.demonstrations(len(examples), k)
    else:
        import numpy

        seeds = numpy.random.RandomState(0).randint(0, 10_000, len(examples)).tolist()
        shown = [[train[index] for index in permutation(len(train), seed)[:k]] for seed in seeds]
    if shown and len(shown[0]) < k:
        raise UserError(f"k={k} demonstrations are wanted and there are {len(shown[0])} rows to show: lower k")
    return [with_demonstrations(one, own, task.separator) for one, own in zip(examples, shown, strict=True)]
