"""Evaluation longest rows first, so that batches hold little padding, and the results back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

if TYPE_CHECKING:
    from transformers import EvalPrediction


class LongestFirst(torch.utils.data.Sampler[int]):
    """Indices from the longest row to the shortest, equal ones in their order: what is too large fails at once.

    Args:
        lengths: of the rows.

    Example:
        >>> list(LongestFirst([3, 7, 3, 9]))
        [3, 1, 0, 2]
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def lengths_of(rows: Any) -> list[int] | None:
    """How many tokens the ``input_ids`` of each row have; None where rows have none, or no number of rows is known."""
    if not hasattr(rows, "__len__") or not len(rows):
        return None
    if not isinstance(rows[0], Mapping) or "input_ids" not in rows[0]:
        return None
    return [len(rows[index]["input_ids"]) for index in range(len(rows))]


def order_of(dataloader: Any) -> list[int] | None:
    """The order that a data loader takes its rows in, where a :class:`LongestFirst` decides it.

    Accelerate wraps each process's batch sampler in one of its own: the innermost sampler is looked for.
    """
    sampler = getattr(dataloader, "batch_sampler", None)
    while sampler is not None and not isinstance(sampler, LongestFirst):
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    return None if sampler is None else sampler.order


def in_rows_order(values: Any, order: Sequence[int]) -> Any:
    """Results that came in ``order``, in the order of the rows: an array, or a tuple of arrays.

    Example:
        >>> in_rows_order(numpy.array([30, 10, 20]), [2, 0, 1])
        array([10, 20, 30])
    """
    if isinstance(values, tuple):
        return tuple(in_rows_order(value, order) for value in values)
    return values if values is None else values[numpy.argsort(order)]


def metric_in_rows_order(
    metric: Callable[[EvalPrediction], dict[str, float]], order: Sequence[int]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """``metric`` as it would be called without the sorting: it may know by their order which rows it is told of."""

    def sorted_back(given: EvalPrediction) -> dict[str, float]:
        return metric(type(given)(in_rows_order(given.predictions, order), in_rows_order(given.label_ids, order)))

    return sorted_back
