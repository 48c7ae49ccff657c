"""SGD: the estimate itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from zoft.optimizers.base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SGD(Optimizer):
    """theta <- theta - learning_rate * (g + weight_decay * theta); no state.

    Args:
        learning_rate: step size; None takes the training arguments' ``learning_rate``.
        weight_decay: decoupled decay per unit of learning rate; None takes the training arguments' ``weight_decay``.

    References: Malladi et al. 2023 (MeZO), Algorithm 1.
    """

    hands_back: ClassVar[bool] = True

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The gradient."""
        del state, step
        return gradient
