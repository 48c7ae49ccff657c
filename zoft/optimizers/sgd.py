"""SGD: the estimate itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers.base import Optimizer
from zoft.utils.lazy import Tensor


@dataclass
class SGD(Optimizer):
    """theta <- theta - learning_rate * (g + weight_decay * theta); no state.

    References: Malladi et al. 2023 (MeZO), Algorithm 1.
    """

    is_identity: ClassVar[bool] = True

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The gradient."""
        del state, step
        # g as it is: rate and decay are applied where it is written
        return gradient
