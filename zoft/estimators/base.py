"""What every estimator promises: points to query, and what their losses say of each direction; pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from zoft.component import Component, Memory
from zoft.errors import Conditions, UserError
from zoft.noise.direction import Direction
from zoft.noise.joint import ACROSS
from zoft.noise.source import SOURCES
from zoft.utils.lazy import Tensor

E = TypeVar("E", bound="Estimator")

EPS_SCHEDULES = ("constant", "linear", "cosine", "tied")
"""How eps goes on: ``tied`` follows the learning rate's schedule."""


@dataclass(frozen=True)
class Point:
    """One evaluation of the objective, at theta + scale * z(direction).

    Args:
        direction: None for the clean point theta.
        scale: signed distance along the direction, in units of the weights; 0 for the clean point.
        derivative: ask for the exact directional derivative at theta instead of the loss (a forward-mode pass).
        anchor: start from the anchor weights (an earlier theta that is kept) instead of theta.
    """

    direction: Direction | None = None
    scale: float = 0.0
    derivative: bool = False
    anchor: bool = False


@dataclass(frozen=True)
class Measured:
    """Slopes and losses of a step, of which a weighting makes coefficients.

    Args:
        projected_grads: the objective's slope along each direction, float32 [Q]; their mean times z is the estimate.
        loss: the training loss to report, a scalar.
        losses: the objective at the perturbed points, float32 [Q, S]: S = 1 (one side) or 2 (+, -); [Q, 0] if none.
        eps: the finite-difference radius; 0 for exact derivatives.
        curvatures: z^T H z along each direction, float32 [Q], from estimators that measure it.
        examples: ``losses`` of each of B examples, float32 [Q, S, B], for weightings that ask for them.
    """

    projected_grads: Tensor
    loss: Tensor
    losses: Tensor
    eps: float = 0.0
    curvatures: Tensor | None = None
    examples: Tensor | None = None


@dataclass
class Estimator(Component):
    """At which points to query, and what the losses say of the slope along each direction.

    Args:
        num_directions: directions per step, q >= 1.
        noise: where directions come from: counter (same bits everywhere), or torch_sequential (MeZO's own stream).
        across: how a step's directions hang together: iid, antithetic (pairs z, -z) or orthogonal.
    """

    backpropagates: ClassVar[bool] = False
    """Whether some of the gradient comes from a backward pass (:class:`zoft.estimators._optional.NeedsBackward`)."""

    measures_slopes: ClassVar[bool] = True
    """Whether each projected gradient is the slope along its own direction, and not only right on average."""

    num_directions: int = 1
    noise: str = "counter"
    across: str = "iid"

    def check(self) -> None:
        """Refuse too few directions, an unknown source of noise, and directions that cannot hang together so."""
        self.require(self.num_directions >= 1, "num_directions", "at least 1")
        self.require(self.noise in SOURCES, "noise", f"one of {', '.join(SOURCES)}")
        self.require(self.across in ACROSS, "across", f"one of {', '.join(ACROSS)}")
        # directions 2 i and 2 i + 1 are a pair
        if self.across == "antithetic" and self.num_directions % 2:
            raise UserError(
                f"{self.name()}.across=antithetic makes pairs z, -z: num_directions must be even, got "
                f"{self.num_directions}"
            )
        if self.across == "orthogonal" and self.num_directions == 1:
            raise UserError(
                f"{self.name()}.across=orthogonal needs two directions or more: raise num_directions, or drop it"
            )
        # MeZO's generator gives one direction after the other, which nothing can turn to right angles
        if self.across != "iid" and self.noise == "torch_sequential":
            raise UserError(f"{self.name()}.across={self.across} needs noise=counter: MeZO's own stream is iid")

    def check_with(self, method: Any) -> None:
        """Refuse the other parts of a :class:`zoft.step.method.Method` that make no sense with this estimator."""

    @property
    def num_queries(self) -> int:
        """Forward passes of the objective that one ordinary step costs."""
        raise NotImplementedError

    def queries_at(self, step: int) -> int:
        """Forward passes that step number ``step`` costs, where some steps cost more than others."""
        del step
        return self.num_queries

    @property
    def radius(self) -> float:
        """The finite-difference radius eps, 0 where there is none (exact derivatives)."""
        # one question for all estimators: those without differences have no field eps
        return float(getattr(self, "eps", 0.0))

    def with_radius(self: E, eps: float) -> E:
        """This estimator with another finite-difference radius, where it has one.

        Args:
            eps: in units of the weights.
        """
        return replace(self, eps=eps) if hasattr(self, "eps") else self  # type: ignore[call-arg]

    @property
    def asks_clean_loss(self) -> bool:
        """Whether one of the points is the clean one."""
        # any step will do: whether a clean point is among them is the estimator's, not the step's
        points = self.points(self.directions(0, 0))
        return any(point.direction is None and not point.anchor for point in points)

    def directions(self, seed: int, step: int) -> list[Direction]:
        """The names of this step's directions."""
        # a direction is a name: nothing is drawn here
        return [Direction(seed, step, index) for index in range(self.num_directions)]

    def points(self, directions: list[Direction]) -> list[Point]:
        """Where to query the objective, in the order in which it is cheapest to walk there."""
        raise NotImplementedError

    def init(self) -> Memory:
        """The estimator's memory before the first step: plain numbers; empty for most."""
        return {}

    def measure(self, losses: Tensor, state: Memory | None = None) -> Measured:
        """Slopes, the training loss, and the losses that a weighting may read.

        Args:
            losses: the objective at :meth:`points`, in their order, float32 [P].
            state: what :meth:`init` gave; updated in place. Without one, every call is the first.
        """
        del state
        # p, L, [L+, L-] and eps: all that a weighting may go by
        return Measured(
            projected_grads=self.projected_grads(losses),
            loss=self.loss(losses),
            losses=self.probe_losses(losses),
            eps=self.radius,
        )

    def terms(self, terms: list[tuple[Direction, float]], state: Memory) -> list[tuple[Direction, float]]:
        """The estimate, from the step's own directions and coefficients and what is remembered of earlier ones.

        Args:
            terms: of this step.
            state: what :meth:`init` gave; updated in place.
        """
        del state
        return terms

    def projected_grads(self, losses: Tensor) -> Tensor:
        """The directional derivative of the objective along each direction, float32 [Q]."""
        raise NotImplementedError

    def loss(self, losses: Tensor) -> Tensor:
        """The training loss to report, a scalar."""
        raise NotImplementedError

    def probe_losses(self, losses: Tensor) -> Tensor:
        """The losses at the perturbed points, [Q, S]; see :class:`Measured`."""
        return losses.new_empty(self.num_directions, 0)


@dataclass
class FiniteDifference(Estimator):
    """An estimator with a radius eps, and its schedule.

    Args:
        eps: finite-difference radius, in units of the weights.
        eps_schedule: constant, linear or cosine (from eps to eps * eps_end over the run), or tied (eps follows the
            learning rate's schedule).
        eps_end: what is left of eps at the end, as a share of it; for linear and cosine.
    """

    counts_with: ClassVar[Conditions] = {"eps_end": ("eps_schedule", ("linear", "cosine"))}

    eps: float = 1e-3
    eps_schedule: str = "constant"
    eps_end: float = 0.25

    def check(self) -> None:
        """Refuse eps <= 0 and an unknown schedule."""
        super().check()
        self.require(0 < self.eps < float("inf"), "eps", "> 0 and finite")
        self.require(self.eps_schedule in EPS_SCHEDULES, "eps_schedule", f"one of {', '.join(EPS_SCHEDULES)}")
        self.require(0 < self.eps_end <= 1, "eps_end", "above 0 and at most 1")


def scheduled(estimator: E, done: float, rate: float) -> E:
    """The estimator as it is at some place of the run: with the eps of that place, where eps has a schedule.

    Args:
        estimator: as it was made.
        done: share of the run's steps that have been taken, in [0, 1).
        rate: the learning rate divided by what it was at the start.
    """
    if not isinstance(estimator, FiniteDifference):
        return estimator
    schedule, end = estimator.eps_schedule, estimator.eps_end
    # a learning rate of 0 (warm-up) would make eps 0, and differences 0 / 0
    if schedule == "constant" or (schedule == "tied" and not rate):
        return estimator
    shares = {
        # shares of eps: 1 at the start (done = 0), ``end`` at the end (done = 1)
        "linear": 1 - (1 - end) * done,
        "cosine": end + (1 - end) * (1 + math.cos(math.pi * done)) / 2,
        "tied": rate,
    }
    return replace(estimator, eps=estimator.eps * shares[schedule])
