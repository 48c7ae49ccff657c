"""The option chosen for each row: many rows in a forward, with the decisions of one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.lm.metrics.order import LongestFirst
from zoft.utils.lazy import Tensor, torch

Row = dict[str, Any]
Scorer = Callable[[Sequence[Row]], "Tensor"]
"""Rows -> their scores [B, O], -inf where a row has fewer options than others."""

CLOSE = {"float32": 1e-4, "float64": 1e-10}
"""How near two scores of a dtype may be, relative to the larger of 1 and their size, before the batch could decide
which is the larger; 5e-2 in 16 bits."""


@dataclass(frozen=True)
class Decision:
    """What was decided for one row.

    Args:
        scores: of its options.
        chosen: index of the best one; the first of equal ones.
        alone: whether the row was scored by itself, because its best two were too close to tell in a batch.
    """

    scores: list[float]
    chosen: int
    alone: bool = False


def in_batches(rows: Sequence[Row], batch_size: int, done: Callable[[list[int]], None]) -> None:
    """Call ``done`` with the numbers of the rows of each batch, longest rows first.

    Example:
        >>> seen = []
        >>> in_batches([{"input_ids": [1]}, {"input_ids": [1, 2, 3]}, {"input_ids": [1, 2]}], 2, seen.append)
        >>> seen
        [[1, 2], [0]]
    """
    order = LongestFirst([len(row["input_ids"]) for row in rows]).order
    for start in range(0, len(order), batch_size):
        done(order[start : start + batch_size])


def choose(rows: Sequence[Row], score: Scorer, score_alone: Scorer, batch_size: int, close: float) -> list[Decision]:
    """Decide for every row.

    What is computed together differs in its last bits from what is computed alone. Where that could turn a decision,
    the row is scored alone, so every decision is the one that an evaluation of one candidate at a time comes to.

    Args:
        rows: with ``input_ids``.
        score: of a batch.
        score_alone: of one row, without padding and without others.
        batch_size: rows in a forward.
        close: see :data:`CLOSE`.

    Example:
        >>> import torch
        >>> rows = [{"input_ids": [1]}, {"input_ids": [2]}]
        >>> batch = lambda rows: torch.tensor([[0.0, 1e-9], [0.0, 1.0]])[: len(rows)]
        >>> [choice.chosen for choice in choose(rows, batch, lambda rows: torch.zeros(1, 2), 2, 1e-4)]
        [0, 1]
    """
    choices: list[Decision | None] = [None] * len(rows)

    def decide(numbers: list[int]) -> None:
        scores = score([rows[number] for number in numbers]).tolist()
        for number, row in zip(numbers, scores, strict=True):
            choices[number] = _choice(row)

    in_batches(rows, batch_size, decide)
    return [
        _choice(score_alone([row])[0].tolist(), alone=True) if is_close(choice.scores, close) else choice
        for row, choice in zip(rows, choices, strict=True)
        if choice is not None
    ]


def is_close(scores: Sequence[float], close: float) -> bool:
    """Whether the best two are too near each other to be told apart; NaN always is."""
    best = sorted((score for score in scores if score != -math.inf), reverse=True)
    if any(map(math.isnan, best)):
        return True
    return len(best) > 1 and best[0] - best[1] <= close * max(1.0, abs(best[0]), abs(best[1]))


def _choice(scores: list[float], *, alone: bool = False) -> Decision:
    scores = [score for score in scores if score != -math.inf]
    return Decision(scores, scores.index(max(scores)), alone)


def cross_entropy(choices: Sequence[Decision], labels: Sequence[int]) -> float:
    """Mean of -log softmax(scores)[label]: nats a row."""
    losses = []
    for choice, label in zip(choices, labels, strict=True):
        best = max(choice.scores)
        losses.append(best + math.log(sum(math.exp(score - best) for score in choice.scores)) - choice.scores[label])
    return math.fsum(losses) / len(losses)


class Calibrated:
    """Sums of log-probabilities less those behind the prompt without content, which is scored once for all its rows.

    Args:
        scores: means of log-probabilities of the options of rows.

    References: Holtzman et al. 2021 (surface-form competition), as in MeZO's published code.
    """

    def __init__(self, scores: Scorer) -> None:
        self.scores = scores
        self.known: dict[str, Tensor] = {}

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """The scores of rows, each with the row ``against`` which it is; float64 [B, O]."""
        own_sums = self._sums(rows)
        missing = {str(row["against"]["sequences"]): row["against"] for row in rows}
        missing = {key: row for key, row in missing.items() if key not in self.known}
        if missing:
            alone = len(rows) == 1
            parts = [[row] for row in missing.values()] if alone else [list(missing.values())]
            sums = [row for part in parts for row in self._sums(part)]
            self.known |= dict(zip(missing, sums, strict=True))
        domains = [self.known[str(row["against"]["sequences"])] for row in rows]
        return torch.stack([_less(one, other) for one, other in zip(own_sums, domains, strict=True)])

    def _sums(self, rows: Sequence[Row]) -> Tensor:
        means = self.scores(rows).double()
        lengths = torch.ones_like(means)
        for place, row in enumerate(rows):
            lengths[place, : len(row["lengths"])] = torch.tensor(row["lengths"], dtype=means.dtype)
        return means * lengths


def _less(sums: Tensor, domain: Tensor) -> Tensor:
    """Differences; options that the row lacks stay at -inf, in whatever width the two were padded to."""
    lacking = sums.isinf()
    domain = torch.nn.functional.pad(domain, (0, max(0, len(sums) - len(domain))))[: len(sums)]
    return torch.where(lacking, sums, sums - domain.where(~lacking, torch.zeros_like(domain)))
