"""The directions of a run's steps, from a seed or from a list of seeds; and the steps that a journal knows already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoft.engines._optional import LeavesTrace
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import Estimator
from zoft.journal.records import Record
from zoft.noise.direction import Direction, step_seed
from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer


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
        seed = self.seed if self.seeds is None else self.seeds[step]
        plain = self.estimator.directions(seed, step)
        # a recorded run has one seed a step: the first direction is drawn from that seed itself, as MeZO's code draws
        if self.seeds is not None:
            return [Direction(step_seed(seed, d.index) if d.index else seed, step, d.index) for d in plain]
        # that source is seeded by the direction's seed alone, so every direction of a run needs another seed
        if self.estimator.noise == "torch_sequential":
            first = step_seed(seed, step)
            return [Direction(first + d.index, step, d.index) for d in plain]
        return plain


def replayed(
    optimizer: ZOOptimizer, directions: StepDirections, record: Record, observed: bytes | None
) -> StepEstimate:
    """The estimate that a record was made from, once its step has begun; ``optimizer.apply`` may follow.

    It does all that :meth:`zoft.step.query.StepQueries.estimate` does but to query: the subspace stands where the
    step's queries had it.

    Args:
        optimizer: at the end of the step before; its learning rate becomes the step's.
        directions: of the run.
        record: what the journal says of the step.
        observed: what the subspace observed in it, and its factors, where the journal has such.

    Raises:
        UserError: the record is of other directions, or is not enough for its step.
    """
    estimator, drawn = directions.estimator, directions.at(record.step)
    # lr is what the run's schedule gave then; a replay has no schedule of its own
    for group in optimizer.param_groups:
        group["lr"] = record.lr
    is_anchor = isinstance(estimator, KeepsAnchor) and estimator.batches_at(record.step) > 0
    estimate = StepEstimate.from_record(record, drawn, observed, keeps_anchor=is_anchor)
    # bases and masks first, then the rule's state in that basis, as before the first query of the step
    optimizer.subspace.begin(drawn[0])
    # what the subspace observed came from activations, and a replay makes no forward
    if estimate.observations is not None:
        optimizer.subspace.load_state_dict(estimate.observations)
    optimizer.begin(drawn[0])
    # what walking to the points and back leaves in the weights, where that is not exact
    if estimate.eps and isinstance(optimizer.session, LeavesTrace):
        optimizer.session.pass_over(estimator.with_radius(estimate.eps).points(drawn))
    return estimate
