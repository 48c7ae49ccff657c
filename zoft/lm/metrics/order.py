"""Evaluation longest rows first, so that batches hold little padding, and the results back in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import torch

if TYPE_CHECKING:
    from transformers import EvalPrediction


class LongestFirst(torch.utils.data.Sampler[int]):
    """Indices from the longest row to the shortest, equal ones in their order: what is too large fails at once.

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
    """``metric``, given the rows in their own order again: it may know a row by its place."""

    def sorted_back(given: EvalPrediction) -> dict[str, float]:
        return metric(type(given)(in_rows_order(given.predictions, order), in_rows_order(given.label_ids, order)))

    return sorted_back


def longest_first(args: Any, rows: Any) -> LongestFirst | None:
    """The sampler of an objective's rows; None where batches are reported one by one, or lengths are not known."""
    in_batches = args.batch_eval_metrics or args.include_for_metrics or not args.eval_do_concat_batches
    lengths = None if in_batches else lengths_of(rows)
    return None if lengths is None else LongestFirst(lengths)


@contextmanager
def reported_in_rows_order(trainer: Any, dataloader: Any) -> Iterator[Callable[[Any], Any]]:
    """While rows are evaluated in another order, metrics see them in their own; what comes out is put into it."""
    order, metric = order_of(dataloader), trainer.compute_metrics
    if order is None:
        yield lambda output: output
        return
    trainer.compute_metrics = None if metric is None else metric_in_rows_order(metric, order)
    try:
        yield lambda output: output._replace(
            predictions=in_rows_order(output.predictions, order), label_ids=in_rows_order(output.label_ids, order)
        )
    finally:
        trainer.compute_metrics = metric


@contextmanager
def every_row_in_order(args: Any) -> Iterator[None]:
    """The Trainer's settings for training rows let no row of an evaluation fall and none move.

    Args:
        args: of the Trainer, as they are again afterwards.
    """
    before = args.dataloader_drop_last, args.dataloader_in_order
    args.dataloader_drop_last, args.dataloader_in_order = False, True
    try:
        yield
    finally:
        args.dataloader_drop_last, args.dataloader_in_order = before
