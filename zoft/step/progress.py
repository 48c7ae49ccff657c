"""Counters of a run, and sums of steps kept in coordinates."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from zoft.noise.direction import Direction


@dataclass
class Progress:
    """Counters of a run; they are saved with the optimizer.

    Args:
        steps: optimisation steps taken, skipped ones included; the directions' step number.
        updates: steps that moved the weights.
        num_queries: forward passes of the objective, clean ones included.
        num_tokens: tokens of the steps' batches times the steps' queries, over all processes.
        num_skipped: steps skipped because a loss was not finite.
        skipped_in_a_row: how many of the last steps were skipped.
        seconds: wall time of training steps.
        seconds_forward: wall time spent querying the objective.
        losses: training losses since the last log line, whose mean the next one says.
        num_guarded: steps that were far outside the running range and were shortened.
        recent: (loss, slope) of the last steps inside it, as many as ``guard_steps``.
        num_parts: into how many micro-batches were cut in the last step, where memory did not suffice.
    """

    steps: int = 0
    updates: int = 0
    num_queries: int = 0
    num_tokens: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    seconds_forward: float = 0.0
    losses: list[float] = field(default_factory=list)
    num_guarded: int = 0
    recent: list[list[float]] = field(default_factory=list)
    num_parts: int = 1


@dataclass
class Sum:
    """The steps that a tensor of few bits has taken in one basis, added up in coordinates.

    Args:
        total: float32, of the coordinates' shape: learning rate times update, summed.
        first: the number of the first of these updates; it names the random bits.
        direction: one of the last of these steps: it says which basis.
    """

    total: Tensor
    first: int
    direction: Direction

    def add_(self, start: int, stop: int, update: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Add a step to the coordinates [start, stop): the sum there before and after."""
        here = self.total.view(-1)[start:stop]
        before = here.clone()
        return before, here.add_(update, alpha=lr).clone()
