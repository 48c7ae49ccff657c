"""A step of the journal, handed to the stepper as its queries would have."""

from __future__ import annotations

from zoft.errors import UserError
from zoft.journal import state
from zoft.journal.records import Record
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.step.update import ZOOptimizer


def put_record(
    method: Method, stepper: ZOOptimizer, directions: list[Direction], record: Record, look: bytes | None
) -> None:
    """Begin the step and leave its estimate with the stepper; :meth:`ZOOptimizer.step` then writes it.

    Args:
        method: the composition.
        stepper: at the end of the step before.
        directions: of the step, as the run draws them.
        record: what the journal says of it.
        look: what the subspace saw before it, where it looked.

    Raises:
        UserError: the step was made of other directions, or of a gradient, which no journal holds.
    """
    if directions[0].seed != record.seed:
        raise UserError(
            f"the journal's step {record.step} has direction seed {record.seed}, this run draws with "
            f"{directions[0].seed}: give the run's own seed"
        )
    if record.computed:
        raise UserError(
            f"step {record.step} was made of a gradient (estimator={method.estimator.name()}), which is not in the "
            "journal: resume from a checkpoint"
        )
    coordinates = stepper.coordinates
    coordinates.begin(directions[0])
    if look is not None:
        coordinates.load_state_dict(state.unpack(look))
    stepper.begin(directions[0])
    named = [Direction(*which) for which in record.extra.get("directions", ())] or directions
    stepper.pending = None if record.skipped else list(zip(named, record.coefficients, strict=True))
    stepper.curvatures = list(record.curvatures) or None
    stepper.backward = stepper.factors = None
    stepper.scalars.update(record.extra.get("scalars", {}))
    if method.estimator.batches_at(record.step) and not record.skipped:
        stepper.session.keep_anchor()
