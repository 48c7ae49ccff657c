"""Adam's step control with one number for all weights (MEAZO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from zoft.component import Memory
from zoft.optimizers._optional import RescalesCoefficients
from zoft.optimizers.base import Optimizer
from zoft.utils.lazy import Tensor


@dataclass
class ScalarAdam(RescalesCoefficients, Optimizer):
    """The estimate divided by the running root mean square of its coefficients; no memory.

    v <- beta2 v + (1 - beta2) sum_j a_j^2;  step = (sum_j a_j z_j) / (sqrt(v_hat) + adam_epsilon).

    A slope p = z^T grad L of a direction with E z z^T = I has E p^2 = ||grad L||^2, so sqrt(v) follows the length of
    the gradient, over sqrt(q) for the mean of q slopes (a_j = p_j / q): normalised gradient descent, without memory.

    The paper averages first: v follows (sum_j a_j)^2. With one direction it is the same number, and with independent
    ones it has the same expectation, as E a_i a_j = 0. But it vanishes, and the step with it explodes, where
    coefficients add up to zero: in antithetic pairs, under a mean baseline, as z-scores. The sum of squares does not.

    Args:
        adam_beta2: weight of the past in the second moment, in [0, 1).
        adam_epsilon: added to the root of the second moment, > 0.

    References: Dbouk et al. 2026 (MEAZO, arXiv 2605.03869).
    """

    is_identity: ClassVar[bool] = True
    uses_directions: ClassVar[str] = "goes by the coefficients of directions"

    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8

    def check(self) -> None:
        """Refuse a weight outside [0, 1)."""
        super().check()
        self.require(0 <= self.adam_beta2 < 1, "adam_beta2", "in [0, 1)")
        self.require(0 < self.adam_epsilon < float("inf"), "adam_epsilon", "> 0 and finite")

    def init(self) -> Memory:
        """The second moment, and the number of updates that it has seen."""
        return {"moment2": 0.0, "updates": 0}

    def coefficients(self, coefficients: list[float], scalars: Memory) -> list[float]:
        """Each divided by the root of the bias-corrected second moment."""
        # sum_j a_j^2
        square = math.fsum(coefficient**2 for coefficient in coefficients)
        scalars["updates"] += 1
        # v <- beta2 v + (1 - beta2) sum_j a_j^2
        scalars["moment2"] = self.adam_beta2 * scalars["moment2"] + (1 - self.adam_beta2) * square
        # sqrt(v_hat) + epsilon, with v_hat = v / (1 - beta2^t)
        root = math.sqrt(scalars["moment2"] / (1 - self.adam_beta2 ** scalars["updates"])) + self.adam_epsilon
        # a_j / (sqrt(v_hat) + epsilon): the step is this times z_j, summed
        return [coefficient / root for coefficient in coefficients]

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The estimate, of coefficients that are scaled already."""
        del state, step
        return gradient
