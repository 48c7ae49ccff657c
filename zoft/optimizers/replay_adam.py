"""Adam without memory: its moments are made anew in each step from the last steps' directions (AdaMeZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers.base import Estimate, Optimizer, State
from zoft.utils.lazy import Tensor


@dataclass
class ReplayAdam(Optimizer):
    """Adam over the last ``history`` estimates, drawn again in each step from directions and coefficients; no memory.

    m = sum_k beta1^k g_k / sum_k beta1^k,  v = sum_k beta2^k g_k^2 / sum_k beta2^k,  step = m / (sqrt(v) + epsilon),
    with g_k = sum_j a_j z_j, the whole estimate of k updates ago (k = 0 is this one): with one direction g_k^2 is
    c^2 z^2 as in the paper. The weights are divided by the sum of those in use, which is Adam's bias correction for
    a window. Each step draws ``history`` times the random numbers.

    Estimates of an earlier basis stand for other steps, so the window begins anew when the subspace changes its basis.
    The published code leaves the sums as they are and multiplies by 100: with a full window of 10 its learning rate is
    to be multiplied by 127 here.

    Args:
        history: estimates that are looked at, this step's among them, at least 1.
        adam_beta1: weight of the past in the first moment, in [0, 1).
        adam_beta2: weight of the past in the second moment, in [0, 1).
        adam_epsilon: added to the root of the second moment, > 0.

    References: Cai et al. 2026 (AdaMeZO, arXiv 2605.00650).
    """

    uses_directions: ClassVar[str] = "goes by the coefficients of directions"

    history: int = 10
    adam_beta1: float = 0.7
    adam_beta2: float = 0.9
    adam_epsilon: float = 1e-5

    def check(self) -> None:
        """Refuse an empty window and weights outside [0, 1)."""
        super().check()
        self.require(self.history >= 1, "history", "at least 1")
        for field in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, field) < 1, field, "in [0, 1)")
        self.require(0 < self.adam_epsilon < float("inf"), "adam_epsilon", "> 0 and finite")

    @property
    def history_length(self) -> int:
        """Those before this step's."""
        # this step's estimate is there anyway
        return self.history - 1

    def update_from(self, estimate: Estimate, state: State, step: int) -> Tensor:
        """The ratio of the moments of the window."""
        del state, step
        moment1 = estimate.gradient()
        moment2 = moment1.square()
        sums = [1.0, 1.0]
        # m = sum_k beta1^k g_k, v = sum_k beta2^k g_k^2, with g_k drawn again from its directions and coefficients
        for age, record in enumerate(reversed(estimate.records), start=1):
            gradient = estimate.combination(record)
            weights = self.adam_beta1**age, self.adam_beta2**age
            moment1.add_(gradient, alpha=weights[0])
            moment2.addcmul_(gradient, gradient, value=weights[1])
            sums = [total + weight for total, weight in zip(sums, weights, strict=True)]
        # (m / sum_k beta1^k) / (sqrt(v / sum_k beta2^k) + epsilon)
        return moment1.div_(sums[0]).div_(moment2.div_(sums[1]).sqrt_().add_(self.adam_epsilon))
