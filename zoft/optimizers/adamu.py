"""Directions drawn around the momentum, more and more so, and steps scaled by their second moment (ZO-AdaMU)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers.base import Estimate, Optimizer, State
from zoft.optimizers.cone import Mix, mix
from zoft.utils.lazy import Tensor


@dataclass
class AdaMU(Optimizer):
    """Directions are drawn around the momentum, more so as the run goes on; the step is scaled by their squares.

    z = sqrt(alpha) u + sqrt(1 - alpha) sqrt(d) m / ||m||, with the uncertainty alpha = 1 for ``explore_steps`` steps,
    falling as a cosine to ``alpha`` over the next ``anneal_steps``, and staying there. E||z||^2 = d throughout.
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) mean_j z_j^2;  step = g / (sqrt(v) + adam_epsilon).
    Two float32 numbers per coordinate.

    v follows the diagonal of E[z z^T], from which the estimate gets its pull towards m (E g = E[z z^T] grad L): where
    the directions keep going, the step is shortened.

    The paper's momentum is a running mean of the random directions themselves. It knows nothing of the loss, and both
    parts shrink each other, so that its directions are shorter than sqrt(d). Here it is a running mean of the
    estimates, as in ``cone``; the mix keeps the length; and v is a mean over steps, where the paper divides by the
    squares of the very direction the step goes along, under a root of v^2.

    Args:
        alpha: what is left of the uncertainty in the end, above 0 and at most 1.
        explore_steps: steps before the directions begin to lean, >= 0.
        anneal_steps: steps that they take to lean as far as they will, >= 0.
        beta1: weight of the past in the momentum, in [0, 1).
        beta2: weight of the past in the second moment, in [0, 1).
        adam_epsilon: added to the root of the second moment, > 0.

    References: Jiang et al. 2024 (ZO-AdaMU, arXiv 2312.15184).
    """

    shapes_directions: ClassVar[bool] = True
    uses_directions: ClassVar[str] = "shapes directions"
    linear_state: ClassVar[tuple[str, ...]] = ("momentum",)
    start_values: ClassVar[dict[str, float]] = {"squares": 1.0}  # what random directions have

    alpha: float = 0.9
    explore_steps: int = 500
    anneal_steps: int = 1000
    beta1: float = 0.9
    beta2: float = 0.99
    adam_epsilon: float = 1e-8

    def check(self) -> None:
        """Refuse phases, shares and weights that cannot be."""
        super().check()
        self.require(0 < self.alpha <= 1, "alpha", "above 0 and at most 1")
        for field in ("explore_steps", "anneal_steps"):
            self.require(getattr(self, field) >= 0, field, ">= 0")
        for field in ("beta1", "beta2"):
            self.require(0 <= getattr(self, field) < 1, field, "in [0, 1)")
        self.require(0 < self.adam_epsilon < float("inf"), "adam_epsilon", "> 0 and finite")

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Running means of the estimates, and of the squares of the directions."""
        return {"momentum": shape, "squares": shape}

    def alpha_at(self, step: int) -> float:
        """The uncertainty in a step.

        Example:
            >>> [round(AdaMU(alpha=0.5, explore_steps=2, anneal_steps=4).alpha_at(s), 2) for s in (0, 2, 4, 6, 99)]
            [1.0, 1.0, 0.75, 0.5, 0.5]
        """
        annealed = step - self.explore_steps
        # share of the way from 1 down to alpha
        share = min(1.0, max(0.0, annealed / self.anneal_steps)) if self.anneal_steps else float(annealed >= 0)
        # alpha_t = alpha + (1 - alpha) (1 + cos(pi share)) / 2: 1 while it explores, alpha in the end
        return self.alpha + (1 - self.alpha) * (1 + math.cos(math.pi * share)) / 2

    def shape_context(self, states: Mapping[str, State], step: int) -> Mix:
        """The factors of the momentum and of the random part."""
        # sin^2 = alpha_t is the share of the fresh noise, cos^2 = 1 - alpha_t that of the momentum
        return mix(states, math.asin(math.sqrt(min(1.0, self.alpha_at(step)))))

    def shape(self, z: Tensor, state: State, context: Mix) -> Tensor:
        """sqrt(alpha) u + sqrt(1 - alpha) sqrt(d) m / ||m||."""
        # z = sqrt(alpha_t) u + sqrt(1 - alpha_t) sqrt(d) m / ||m||
        return z.mul_(context.across).add_(state["momentum"], alpha=context.along)

    def update_from(self, estimate: Estimate, state: State, step: int) -> Tensor:
        """The estimate over the root of the squares' mean."""
        del step
        # both are drawn before the state is written: the directions of this piece depend on it
        gradient = estimate.gradient()
        if estimate.terms:
            # equal weights: the mean over the step's directions, whatever their coefficients are
            share = (1 - self.beta2) / len(estimate.terms)
            drawn = estimate.squares([(direction, share) for direction, _ in estimate.terms])
            # v <- beta2 v + (1 - beta2) mean_j z_j^2
            state["squares"].mul_(self.beta2).add_(drawn)
        # m <- beta1 m + (1 - beta1) g
        state["momentum"].mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        # g / (sqrt(v) + epsilon)
        return gradient.div_(state["squares"].sqrt().add_(self.adam_epsilon))
