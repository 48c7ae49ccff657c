"""What every estimator promises: points to query, and coefficients from their losses; two pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoft.component import Component
from zoft.errors import UserError
from zoft.noise import SOURCES, Direction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Point:
    """One evaluation of the objective, at theta + scale * z(direction).

    Args:
        direction: None for the clean point theta.
        scale: signed distance along the direction, in units of the weights; 0 for the clean point.
        derivative: ask for the exact directional derivative at theta instead of the loss (a forward-mode pass).
    """

    direction: Direction | None = None
    scale: float = 0.0
    derivative: bool = False


@dataclass
class Estimator(Component):
    """At which points to query, and how losses become one coefficient per direction.

    Args:
        num_directions: directions per step, q >= 1.
        noise: where directions come from: counter (same bits everywhere), or torch_sequential (MeZO's own stream).
    """

    num_directions: int = 1
    noise: str = "counter"

    def check(self) -> None:
        """Refuse q < 1 and an unknown source of noise."""
        self.require(self.num_directions >= 1, "num_directions", "at least 1")
        self.require(self.noise in SOURCES, "noise", f"one of {', '.join(SOURCES)}")

    @property
    def num_queries(self) -> int:
        """Forward passes of the objective that one step costs."""
        raise NotImplementedError

    def steps_within(self, queries: int) -> int:
        """How many steps a budget of queries pays for.

        Args:
            queries: forward passes of the objective.

        Raises:
            UserError: less than one step.
        """
        if queries < self.num_queries:
            raise UserError(
                f"budget.queries={queries} is less than one step costs: estimator={self.name()} with "
                f"num_directions={self.num_directions} makes {self.num_queries} queries a step"
            )
        return queries // self.num_queries

    @property
    def radius(self) -> float:
        """The finite-difference radius eps, 0 where there is none (exact derivatives)."""
        return float(getattr(self, "eps", 0.0))

    def directions(self, seed: int, step: int) -> list[Direction]:
        """The names of this step's directions."""
        return [Direction(seed, step, probe) for probe in range(self.num_directions)]

    def points(self, directions: list[Direction]) -> list[Point]:
        """Where to query the objective, in the order in which it is cheapest to walk there."""
        raise NotImplementedError

    def coefficients(self, losses: Tensor) -> Tensor:
        """One coefficient per direction, [Q], so that the gradient estimate is sum_j c_j z_j.

        Args:
            losses: the objective at :meth:`points`, in their order, float32 [P].
        """
        return self.projected_grads(losses) / self.num_directions

    def projected_grads(self, losses: Tensor) -> Tensor:
        """The directional derivative of the objective along each direction, float32 [Q]."""
        raise NotImplementedError

    def loss(self, losses: Tensor) -> Tensor:
        """The training loss to report, a scalar."""
        raise NotImplementedError
