"""Heavy-ball momentum over the estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers.base import Optimizer
from zoft.utils.lazy import Tensor


@dataclass
class Momentum(Optimizer):
    """m <- beta m + (1 - beta) g; the step is m. One float32 number per coordinate.

    The estimate is averaged rather than summed, so that a learning rate tuned for ``sgd`` carries over.

    Args:
        beta: weight of the past, in [0, 1).

    References: Polyak 1964; Zhang et al. 2024 (ZO-Bench), ZO-SGD-MMT.
    """

    beta: float = 0.9

    def check(self) -> None:
        """Refuse beta outside [0, 1)."""
        super().check()
        self.require(0 <= self.beta < 1, "beta", "in [0, 1)")

    linear_state: ClassVar[tuple[str, ...]] = ("momentum",)

    def state_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The running mean."""
        return {"momentum": shape}

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The running mean of the estimates."""
        del step
        # m <- beta m + (1 - beta) g; a copy, because the caller may overwrite the step
        return state["momentum"].mul_(self.beta).add_(gradient, alpha=1 - self.beta).clone()
