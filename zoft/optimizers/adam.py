"""Adam over the estimates, with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers.base import Optimizer
from zoft.utils.lazy import Tensor


@dataclass
class Adam(Optimizer):
    """m / (sqrt(v) + adam_epsilon) with bias correction. Two float32 numbers per coordinate.

    With one direction a step the second moment measures the noise, not the gradient; use many directions or few
    coordinates (SubZero+, table of K; see docs/concepts.md).

    In a subspace the moments are those of its coordinates. When it changes its basis, the first moment is carried over,
    for it is linear in the estimates. The second is not: it stays as it is. A new basis comes from the old one's law,
    so the sizes it tells are right along the axis that keeps its meaning and of the right order along the other; begun
    anew it would be too small for some 1 / (1 - adam_beta2) steps, and these steps too large.

    Args:
        adam_beta1: weight of the past in the first moment, in [0, 1).
        adam_beta2: weight of the past in the second moment, in [0, 1).
        adam_epsilon: added to the root of the second moment, > 0.

    References: Kingma & Ba 2015, Algorithm 1; Loshchilov & Hutter 2019 for the decay; MeZO-Adam in Malladi et al. 2023.
    """

    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8

    def check(self) -> None:
        """Refuse moments' weights outside [0, 1)."""
        # with the base's checks, of rate and decay
        super().check()
        for field in ("adam_beta1", "adam_beta2"):
            self.require(0 <= getattr(self, field) < 1, field, "in [0, 1)")
        self.require(0 < self.adam_epsilon < float("inf"), "adam_epsilon", "> 0 and finite")

    linear_state: ClassVar[tuple[str, ...]] = ("moment1",)

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """First and second moment."""
        return {"moment1": shape, "moment2": shape}

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The bias-corrected ratio of the moments."""
        # m <- beta1 m + (1 - beta1) g
        moment1 = state["moment1"].mul_(self.adam_beta1).add_(gradient, alpha=1 - self.adam_beta1)
        # v <- beta2 v + (1 - beta2) g^2
        moment2 = state["moment2"].mul_(self.adam_beta2).addcmul_(gradient, gradient, value=1 - self.adam_beta2)
        # sqrt(v_hat) + epsilon, with v_hat = v / (1 - beta2^t)
        root = moment2.div(1 - self.adam_beta2**step).sqrt_().add_(self.adam_epsilon)
        # m_hat / (sqrt(v_hat) + epsilon), with m_hat = m / (1 - beta1^t)
        return moment1.div(root).div_(1 - self.adam_beta1**step)
