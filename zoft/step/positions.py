"""The positions of a batch at which layers' outputs are perturbed, and what a forward is read as there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zoft.subspaces.nodes import NodeSpace
from zoft.utils.lazy import Tensor, torch


class PositionReadout(Protocol):
    """The losses and scores of one forward, position by position (:class:`zoft.lm.objectives._readout.Readout`)."""

    @property
    def values(self) -> Tensor: ...  # noqa: D102
    @property
    def slopes(self) -> Tensor: ...  # noqa: D102
    @property
    def keys(self) -> Tensor: ...  # noqa: D102
    @property
    def columns(self) -> Tensor: ...  # noqa: D102
    @property
    def losses(self) -> Tensor: ...  # noqa: D102
    @property
    def calls(self) -> Tensor | None: ...  # noqa: D102
    @property
    def asked(self) -> Tensor | None: ...  # noqa: D102


@dataclass(frozen=True)
class NodePositions:
    """Positions of a batch at which outputs are perturbed.

    Args:
        rows: [P] int64, the row.
        columns: [P] int64, where in it, counted from the right end (negative).
        starts: [R] int64, each row's first token, counted from the right end.
        anchor: [P] int64, the position that the loss is read from and that each belongs to: its number.
        distance: [P] int64, how far in front of that it is.
    """

    rows: Tensor
    columns: Tensor
    starts: Tensor
    anchor: Tensor
    distance: Tensor

    def keys(self, keys: Tensor, *, apart: bool) -> Tensor:
        """The key of each position, from those of the positions that the loss is read from.

        Args:
            keys: of those.
            apart: whether distances are told apart, or only those in front of the others.
        """
        # a position in front of the loss answers differently from the one behind it, and has a key of its own
        distance = self.distance if apart else self.distance.clamp_max(1)
        return keys[self.anchor] + distance * 1_000_003  # tokens of an option have keys in a row: step over them


class ObjectiveReader(Protocol):
    """How the objective is read, micro-batch by micro-batch."""

    def parts(self, batch: Any) -> Sequence[Any]:
        """The micro-batches of a step."""

    def places(self, part: Any) -> NodePositions:
        """The positions that the loss is read from."""

    def read(self, part: Any) -> PositionReadout:
        """Run one forward and read the objective in it."""

    def new_cache(self) -> Any:
        """An empty cache of keys and values, as the model takes it."""

    def tail(self, part: Any, last: int) -> Any:
        """The last tokens of each row alone, as a micro-batch; None where whole rows have to go through."""


def at_loss(rows: Tensor, columns: Tensor, starts: Tensor) -> NodePositions:
    """NodePositions that the loss is read from, each its own anchor."""
    order = torch.arange(len(rows), device=rows.device)
    return NodePositions(rows, columns, starts, order, torch.zeros_like(order))


def numbered(counts: list[list[int]], rank: int) -> tuple[list[int], int]:
    """The first number of each micro-batch of a process, by micro-batch, process and row; and how many there are."""
    offsets, first = list[int](), 0
    for micro_batch in range(max(map(len, counts))):
        for other, of_rank in enumerate(counts):
            if micro_batch < len(of_rank):
                offsets += [first] * (other == rank)
                first += of_rank[micro_batch]
    return offsets, first


def expand(places: NodePositions, space: NodeSpace) -> NodePositions:
    """The positions that are perturbed: those of the loss, and what ``subspace.positions`` adds in front of them.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> read = at_loss(torch.tensor([0, 0]), torch.tensor([-4, -1]), torch.tensor([-6]))
        >>> space = SimpleNamespace(subspace=SimpleNamespace(positions="last", num_positions=2))
        >>> more = expand(read, space)
        >>> more.columns.tolist(), more.anchor.tolist(), more.distance.tolist()
        ([-4, -5, -1, -2], [0, 0, 1, 1], [0, 1, 0, 1])
    """
    subspace = space.subspace
    most = {"loss": 1, "last": subspace.num_positions, "all": math.inf}[subspace.positions]
    if most == 1:
        return places
    rows, columns, anchor, distance = [], [], [], []
    starts = places.starts.tolist()
    before: dict[int, int] = {}  # row -> the last position of the loss so far
    for number, (row, column) in enumerate(zip(places.rows.tolist(), places.columns.tolist(), strict=True)):
        first = max(starts[row], before.get(row, -math.inf) + 1)  # a position belongs to the next one of the loss
        before[row] = column
        for step in range(int(min(most, column - first + 1))):
            rows.append(row)
            columns.append(column - step)
            anchor.append(number)
            distance.append(step)
    at = [torch.tensor(one, device=places.rows.device) for one in (rows, columns, anchor, distance)]
    return NodePositions(at[0], at[1], places.starts, at[2], at[3])
