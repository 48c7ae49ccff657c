"""SignSGD: a step of one length in every coordinate."""

from __future__ import annotations

from dataclasses import dataclass

from zoft.optimizers.base import Optimizer
from zoft.utils.lazy import Tensor


@dataclass
class Sign(Optimizer):
    """The sign of each coordinate of the estimate; no state.

    The step of a coordinate has the length of the learning rate, whatever the loss and its slope are. In a subspace
    these are the coordinates of the subspace.

    ZO-Bench's ZO-SGD-Sign takes the sign of the slope along the direction, not of the coordinates: that is
    ``weighting=sign optimizer=sgd``.

    References: Bernstein et al. 2018 (signSGD), Algorithm 1; Liu et al. 2019 (signSGD via zeroth-order oracle).
    """

    def update(self, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """-1, 0 or 1."""
        del state, step
        # sign(g), coordinate by coordinate; 0 where g is 0
        return gradient.sign_()
