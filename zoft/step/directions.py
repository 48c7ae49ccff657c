"""The directions of a run's steps, from a seed or from a list of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.noise.direction import Direction, step_seed


@dataclass(frozen=True)
class StepDirections:
    """Which directions a run draws in which step.

    Args:
        estimator: says how many there are in a step, and where they come from.
        seed: of the run.
        seeds: the seed of each step, for replaying a recorded run (MeZO's step seeds); None derives them.

    Example:
        >>> from zoft.estimators.central import Central
        >>> StepDirections(Central(num_directions=2), seed=7).at(3) == [Direction(7, 3, 0), Direction(7, 3, 1)]
        True
    """

    estimator: Estimator
    seed: int
    seeds: Sequence[int] | None = None

    def at(self, step: int) -> list[Direction]:
        """The directions of a step.

        Args:
            step: number of the step, from 0.

        Raises:
            UserError: there is no seed for it.
        """
        if self.seeds is not None and step >= len(self.seeds):
            raise UserError(f"direction_seeds has {len(self.seeds)} entries, step {step} needs one more")
        if self.seeds is not None:
            seed = self.seeds[step]
            plain = self.estimator.directions(seed, step)
            return [Direction(step_seed(seed, d.index) if d.index else seed, step, d.index) for d in plain]
        plain = self.estimator.directions(self.seed, step)
        if self.estimator.noise == "torch_sequential":  # that source is seeded by the direction's seed alone
            first = step_seed(self.seed, step)
            return [Direction(first + d.index, step, d.index) for d in plain]
        return plain
