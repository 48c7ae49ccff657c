"""SGD that tries the step, its opposite and no step, and takes the one with the lowest loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from zoft.optimizers._optional import TriesSteps
from zoft.optimizers.sgd import SGD


@dataclass
class Conservative(TriesSteps, SGD):
    """The loss is asked at theta, theta - lr g and theta + lr g, and the lowest of the three is where the step leads.

    Two more queries a step, and a third for the clean loss where the estimator does not ask for it. Where losses tie,
    the weights stay; between the step and its opposite the step is taken. The losses are those of the step's batch,
    with the learning rate of the first parameter group. Weight decay is no part of what is tried: it is applied
    whatever is chosen, so that it does not depend on the losses.

    References: Zhang et al. 2024 (ZO-Bench, arXiv 2402.11592), ZO-SGD-Cons.
    """

    uses_directions: ClassVar[str] = "tries steps along directions"
    line_search: ClassVar[tuple[float, ...]] = (1.0, -1.0)  # the step and its opposite

    def choose(self, losses: Mapping[float, float]) -> float:
        """The multiple with the lowest loss: 0 (no step), 1 or -1, the first of them in a tie."""
        # argmin over {theta, theta - lr g, theta + lr g}; min() takes the first of equal ones: to stay, then the step
        return min((0.0, *self.line_search), key=lambda multiple: losses[multiple])
