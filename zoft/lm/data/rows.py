"""Rows of a batch: padded to one length, and taken apart again, example by example or by their length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoft.utils.lazy import Tensor, torch

Batch = dict[str, Any]


def padded(rows: Sequence[Sequence[int]], filler: int, *, left: bool = True, multiple_of: int = 1) -> Tensor:
    """Lists of numbers as one tensor [R, T], filled up on the left, or on the right; T is a multiple of a number.

    Example:
        >>> padded([[5, 6], [7]], 0).tolist()
        [[5, 6], [0, 7]]
    """
    longest = -(-max(map(len, rows)) // multiple_of) * multiple_of
    filled = [[filler] * (longest - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for row, f in zip(rows, filled, strict=True)])


def examples_of(batch: Batch) -> list[Batch]:
    """Batches of one example each, in order; an example of several rows (one an option) stays together.

    Example:
        >>> batch = {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
        >>> [one["input_ids"].tolist() for one in examples_of(batch)]
        [[[5]], [[6, 7]]]
    """
    return [take(batch, rows) for rows in groups_of(batch)]


def of_lengths(batch: Batch, shortest: float, longest: float) -> Batch | None:
    """The examples whose longest row has between ``shortest`` and ``longest`` tokens; None if there are none."""
    lengths = lengths_of(batch)
    # an example goes by its longest row: its options belong together
    groups = [rows for rows in groups_of(batch) if shortest <= max(int(lengths[row]) for row in rows) <= longest]
    if not groups:
        return None
    rows = [row for group in groups for row in group]
    return batch if len(rows) == len(lengths) else take(batch, rows)


def groups_of(batch: Batch) -> list[list[int]]:
    """Numbers of the rows that belong to each example."""
    count, options = _num_rows(batch), batch.get("num_options")
    if options is None:
        return [[row] for row in range(count)]
    groups, row = [], 0
    # num_options stands in every row of an example; its first row says how many follow
    while row < count:
        groups.append(list(range(row, row + int(options[row]))))
        row += int(options[row])
    return groups


def lengths_of(batch: Batch) -> Tensor:
    """Tokens of each row: [R]."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum(1)
    ids = batch.get("input_ids")
    width = 1 if ids is None or ids.dim() < 2 else ids.shape[1]
    return torch.full((_num_rows(batch),), width)


def take(batch: Batch, rows: list[int]) -> Batch:
    """Some rows, without columns that are padding in all of them."""
    count, mask = _num_rows(batch), batch.get("attention_mask")
    index = torch.tensor(rows, device=None if mask is None else mask.device)
    columns = slice(None)
    if mask is not None and mask.dim() == 2:
        # a column that is padding in all of these rows is left out
        used = mask[index].any(0).nonzero()
        columns = slice(int(used[0]), int(used[-1]) + 1) if len(used) else columns
    taken: Batch = {}
    for key, value in batch.items():
        if key == "packed":  # the same tokens in other rows: those would have to be packed anew
            continue
        if isinstance(value, list) and len(value) == count:  # texts and token ids, an entry a row
            taken[key] = [value[row] for row in rows]
            continue
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != count:
            taken[key] = value
            continue
        part = value[index.to(value.device)]
        # [R, T] tensors lose the same columns; [R] ones have none
        taken[key] = part[:, columns] if mask is not None and part.shape[1:2] == mask.shape[1:2] else part
    return taken


def _num_rows(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())
