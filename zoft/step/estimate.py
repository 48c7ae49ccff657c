"""StepEstimate: what one step's queries found, a value that goes from hand to hand until the optimizer applies it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoft.component import Memory
from zoft.engines._backward import Backward
from zoft.errors import UserError
from zoft.journal import state
from zoft.journal.records import COMPUTED, GUARDED, SKIPPED, Record
from zoft.noise.direction import Direction
from zoft.optimizers._factors import Factors, of_state, to_state
from zoft.optimizers.base import Term
from zoft.subspaces.base import SubspaceState


@dataclass(frozen=True)
class StepEstimate:
    """The gradient estimate of one step, sum_j c_j z_j, and all that a journal or a diagnosis wants to know of it.

    Args:
        directions: the step's, as the run draws them; the first one names the step.
        terms: (direction, coefficient) pairs; None where a loss was not finite: the step moves nothing.
        curvatures: z_j^T H z_j for the terms' directions, where they were measured.
        losses: the objective at the points, float32 [P] (or [P, B] where every example has directions of its own).
        projected_grads: slopes along the directions, before any weighting, float32 [Q]; None where none were measured.
        loss: the training loss to report.
        num_queries: forward passes that were made.
        eps: finite-difference radius, in units of the weights; 0 where there is none.
        observations: state of the subspace, where it has observed activations or gradients before the queries.
        memory: what estimator and weighting remember after the step, by part.
        backward: gives gradients of a backward pass that belong to the estimate, tensor by tensor.
        factors: tensor -> its gradient as factors (errors at outputs, inputs), where it comes as that.
        outlier: why a guard has taken this step for one outside the running range; None where it has not.
        share: of the step's length, what a guard has left.
        leaves_no_trace: whether the weights are after the queries what they were before, or what the estimator's points
            alone make of them (:meth:`zoft.engines._optional.LeavesTrace.pass_over`).
        num_parts: into how many the micro-batches were cut, where memory did not suffice.
        keeps_anchor: whether the weights before this step become the anchor of the next ones.
        from_journal: whether it was read from a journal instead of being queried.
        is_applied: whether its step is written into the weights.

    Example:
        >>> StepEstimate.of([(Direction(0, 3), 0.5)]).is_usable
        True
    """

    directions: Sequence[Direction]
    terms: Sequence[Term] | None = None
    curvatures: Sequence[float] | None = None
    losses: Tensor = field(default_factory=partial(torch.empty, 0))
    projected_grads: Tensor | None = None
    loss: float = math.nan
    num_queries: int = 0
    eps: float = 0.0
    observations: SubspaceState | None = None
    memory: Mapping[str, Memory] = field(default_factory=dict)
    backward: Backward | None = None
    factors: Mapping[str, Factors] | None = None
    outlier: str | None = None
    share: float = 1.0
    leaves_no_trace: bool = True
    num_parts: int = 1
    keeps_anchor: bool = False
    from_journal: bool = False
    is_applied: bool = False

    @classmethod
    def of(cls, terms: Sequence[Term], curvatures: Sequence[float] | None = None) -> StepEstimate:
        """An estimate of these terms alone.

        Args:
            terms: at least one.
            curvatures: along their directions.
        """
        return cls([direction for direction, _ in terms], list(terms), curvatures)

    @property
    def step(self) -> int:
        """Number of the step, from 0."""
        return self.directions[0].step

    @property
    def is_usable(self) -> bool:
        """Whether there is an estimate; without one the step must move nothing."""
        return self.terms is not None

    @property
    def slope(self) -> float:
        """Root mean square of the projected gradients; NaN where none were measured."""
        # sqrt(mean_j p_j^2)
        return math.nan if self.projected_grads is None else float(self.projected_grads.square().mean().sqrt())

    @property
    def norm(self) -> float | None:
        """|g| of a log line: the slope where it was measured, of factors their norm over all tensors, else None."""
        if self.projected_grads is not None or not self.factors:
            return None if self.projected_grads is None else self.slope
        return math.sqrt(sum(one.square() for one in self.factors.values()))  # of the matrices E^T X

    def scaled(self, share: float) -> StepEstimate:
        """The estimate with every coefficient times ``share``."""
        assert self.terms is not None
        # share * sum_j c_j z_j = sum_j (share c_j) z_j; of factors sum_p e_p x_p^T, e is scaled
        factors = self.factors and {name: one.scaled(share) for name, one in self.factors.items()}
        return replace(self, terms=[(direction, c * share) for direction, c in self.terms], factors=factors)

    def applied(self) -> StepEstimate:
        """The estimate marked as written, without the tensors of a backward pass or an observation."""
        # the dropped tensors may be as large as the model; what stays is read by log lines and diagnostics
        return replace(self, backward=None, factors=None, observations=None, is_applied=True)

    # ---- written down ------------------------------------------------------------------------------------------------

    def observed(self) -> bytes | None:
        """What the journal keeps in front of the record: observations of the subspace, and factors; None for nothing.

        The loss is among them because a record of a sealed journal has none, and rules that read factors read it too.
        """
        tensors = dict(self.observations or {})
        if self.factors is not None:
            tensors |= {"factors": to_state(self.factors), "loss": self.loss}
        return state.pack(tensors) if tensors else None

    def to_record(self, lr: float, queries: int, tokens: int, *, has_factors: bool = False) -> Record:
        """The journal's record of the step.

        Args:
            lr: learning rate that it is written with.
            queries: forward passes of the run, this step's included.
            tokens: tokens that went through the model, this step's included.
            has_factors: whether the journal has the step's factors (:meth:`observed`).
        """
        directions, coefficients = zip(*self.terms, strict=True) if self.terms else ((), ())
        extra: dict[str, Any] = {}  # what most steps have not: it costs bytes in every record
        if directions != tuple(self.directions[: len(directions)]):
            extra["directions"] = [[d.seed, d.step, d.index, d.example] for d in directions]
        # parts that remember nothing are left out: most runs have none, and a record is a few bytes
        if scalars := {part: memory for part, memory in self.memory.items() if memory}:
            extra["scalars"] = scalars
        if self.num_parts > 1:
            extra["parts"] = self.num_parts
        # a record is enough to take the step again where nothing but coefficients, or kept factors, has made it
        is_repeatable = self.backward is None and (has_factors or (self.factors is None and self.leaves_no_trace))
        return Record(
            step=self.step,
            seed=self.directions[0].seed,
            lr=lr,
            eps=self.eps,
            queries=queries,
            tokens=tokens,
            loss=self.loss,
            slope=self.slope,
            coefficients=tuple(map(float, coefficients)),
            curvatures=tuple(map(float, self.curvatures or ())),
            # flags are bits: a step can be guarded and not repeatable at once
            flags=SKIPPED * (self.terms is None) + COMPUTED * (not is_repeatable) + GUARDED * bool(self.outlier),
            extra=extra,
        )

    @classmethod
    def from_record(
        cls,
        record: Record,
        directions: Sequence[Direction],
        observed: bytes | None = None,
        *,
        keeps_anchor: bool = False,
    ) -> StepEstimate:
        """The estimate that a record was made from.

        Args:
            record: what the journal says of the step.
            directions: the step's, as the run draws them.
            observed: what the subspace observed before it, and the step's factors, where there are any
                (:meth:`observed`).
            keeps_anchor: whether the method makes an anchor in this step.

        Raises:
            UserError: the step was made of other directions, or of a gradient, which no journal holds.
        """
        # another seed is another direction, which no later check would notice
        if directions[0].seed != record.seed:
            raise UserError(
                f"the journal's step {record.step} has direction seed {record.seed}, this run draws with "
                f"{directions[0].seed}: give the run's own seed"
            )
        if record.computed:
            raise UserError(
                f"step {record.step} was made with a gradient, or its queries have left errors in the weights, and "
                "neither is in the journal: resume from a checkpoint"
            )
        # the record names directions that the run does not draw in this step: those of examples, or of an anchor
        named = [Direction(*which) for which in record.extra.get("directions", ())] or directions
        observations = {} if observed is None else state.unpack(observed)
        # a skipped step has none, and moves nothing
        if not record.skipped and "factors" not in observations and len(named) != len(record.coefficients):
            raise UserError(
                f"the journal's step {record.step} has {len(record.coefficients)} coefficients for {len(named)} "
                "directions: it was not written by zoft, or by a run with other settings"
            )
        factors, loss = observations.pop("factors", None), observations.pop("loss", record.loss)
        # directions of an estimate by nodes move layers' outputs: no coefficient of theirs is one of the weights
        terms = [] if factors or record.skipped else list(zip(named, record.coefficients, strict=True))
        return cls(
            directions,
            None if record.skipped else terms,
            list(record.curvatures) or None,
            projected_grads=None if factors else torch.tensor([record.slope], dtype=torch.float64),
            loss=loss,
            eps=record.eps,
            observations=observations or None,
            factors=of_state(factors, "cpu") if factors else None,
            memory=record.extra.get("scalars", {}),
            outlier="outside the running range" if record.guarded else None,
            num_parts=record.extra.get("parts", 1),
            keeps_anchor=keeps_anchor and not record.skipped,
            from_journal=True,
        )


def clip(estimate: StepEstimate, bound: float) -> StepEstimate:
    """The estimate with every projected gradient p clipped to [-bound, bound]: c_j <- c_j min(1, bound / |p_j|).

    Args:
        estimate: as it was queried; one that came to nothing, or has no slopes, comes back as it is.
        bound: > 0.

    Example:
        >>> found = StepEstimate([Direction(0, 0)], [(Direction(0, 0), 4.0)], projected_grads=torch.tensor([4.0]))
        >>> clip(found, 1.0).terms[0][1]
        1.0
    """
    if estimate.terms is None or estimate.projected_grads is None:
        return estimate
    # terms behind those of the slopes are an anchor's, of earlier steps: no slope measured here is theirs
    shares = (bound / estimate.projected_grads.abs().clamp_min(1e-30)).clamp_max(1.0).tolist()
    # clip(p_j) = p_j min(1, bound / |p_j|), and c_j is linear in p_j
    measured, others = estimate.terms[: len(shares)], estimate.terms[len(shares) :]
    return replace(estimate, terms=[*((d, c * s) for (d, c), s in zip(measured, shares, strict=True)), *others])
