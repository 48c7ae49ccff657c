"""Directions from a cone around the momentum, and plain steps along them (ConMeZO)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from zoft.optimizers.base import Optimizer, State, norm_of, num_elements_of
from zoft.utils.lazy import Tensor


@dataclass
class Cone(Optimizer):
    """Directions lie in a cone around the momentum of the estimates; the step is the estimate.

    z = sqrt(d) cos(angle) m / ||m|| + sin(angle) u with u from the subspace's law, and m <- beta m + (1 - beta) g.
    Lengths are taken over all coordinates that move in the step, d is their number, and E||z||^2 = d as without a cone,
    so that eps and the learning rate keep their meaning. Before there is a momentum, z = u. One float32 number per
    coordinate.

    The estimate is drawn towards m: E[z z^T] = d cos^2 m m^T / ||m||^2 + sin^2 I. That matrix is positive definite, so
    the step descends in expectation, and it is the same for -m: only the axis of the cone matters, not its sign. An
    angle of pi / 2 is MeZO.

    Args:
        beta: weight of the past in the momentum, in [0, 1).
        angle: half-angle of the cone, in radians, above 0 and at most pi / 2.

    References: Behric et al. 2025 (ConMeZO, arXiv 2511.02757).
    """

    shapes_directions: ClassVar[bool] = True
    uses_directions: ClassVar[str] = "shapes directions"
    linear_state: ClassVar[tuple[str, ...]] = ("momentum",)

    beta: float = 0.99
    angle: float = 1.35

    def check(self) -> None:
        """Refuse beta outside [0, 1) and an angle that makes no cone."""
        super().check()
        self.require(0 <= self.beta < 1, "beta", "in [0, 1)")
        self.require(0 < self.angle <= math.pi / 2, "angle", "above 0 and at most pi / 2")

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The running mean of the estimates."""
        return {"momentum": shape}

    def shape_context(self, states: Mapping[str, State], step: int) -> Mix:
        """The factors of the momentum and of the random part."""
        del step
        return mix(states, self.angle)

    def shape(self, z: Tensor, state: State, context: Mix) -> Tensor:
        """sqrt(d) cos(angle) m / ||m|| + sin(angle) u."""
        # z = sin(angle) u + sqrt(d) cos(angle) m / ||m||
        return z.mul_(context.across).add_(state["momentum"], alpha=context.along)

    def update(self, gradient: Tensor, state: State, step: int) -> Tensor:
        """The estimate; the momentum takes it in."""
        del step
        # m <- beta m + (1 - beta) g
        state["momentum"].mul_(self.beta).add_(gradient, alpha=1 - self.beta)
        return gradient


class Mix(NamedTuple):
    """A direction in parts: ``across`` times a random one, and ``along`` times the momentum."""

    along: float
    across: float


def mix(states: Mapping[str, State], angle: float) -> Mix:
    """Factors of the momentum and of the random part, for a direction at some angle to the momentum.

    Args:
        states: the state of every tensor that moves, with its ``momentum``.
        angle: in radians.

    Returns:
        ``along`` = sqrt(d) cos(angle) / ||m|| and ``across`` = sin(angle); 0 and 1 while the momentum is zero.
    """
    length = norm_of(states, "momentum")
    # No momentum yet, or a right angle: z = u, as in MeZO.
    if not length or angle >= math.pi / 2:
        return Mix(0.0, 1.0)
    elements = num_elements_of(states, "momentum")
    # E||z||^2 = d cos^2 + d sin^2 = d: eps and the learning rate keep their meaning
    return Mix(math.sqrt(elements) * math.cos(angle) / length, math.sin(angle))
