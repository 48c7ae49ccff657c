"""Per-example central differences: every example of the batch has a direction of its own (Flipout, GRZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.estimators.central import Central
from zoft.utils.lazy import Tensor


@dataclass
class PerExample(Central):
    """Central differences of each example's own loss, along q directions of its own: 2 q queries a step.

    g_ji = (L_i(theta + eps z_ji) - L_i(theta - eps z_ji)) / (2 eps), and the estimate is the mean of g_ji z_ji over all
    q B of them: B directions a batch at the price of one, since an example goes through the model once a point either
    way. The mean of the examples' losses is what it is the gradient of; every example counts alike, also where the
    batch's loss is a mean over tokens. The directions of an example share z with the others', and have signs of
    their own for rows and columns (:class:`zoft.noise.joint.ExampleSigns`): uncorrelated, and nothing more is drawn.
    Of signs (``subspace.law=rademacher``) the variance is a B-th of one direction's; Gaussian ones share their
    elements' sizes, of which 2 ||grad L||^2 of variance remain, nothing against the d / B of many weights.

    Its examples go through the model one by one here: it costs no more queries, but more time than a batch.

    References: GRZO (arXiv 2606.02857); Wen et al. 2018 (Flipout), section 3.1.
    """

    def check_with(self, method: Any) -> None:
        """Refuse directions of one element, which have no rows and columns whose signs an example could turn."""
        if method.subspace.name() == "coordinate":
            raise UserError(
                f"estimator={self.name()} turns the signs of a direction for each example, and subspace=coordinate"
                " moves one weight for all of them: use subspace=full"
            )

    def probe_losses(self, losses: Tensor) -> Tensor:
        """[L+, L-] of each direction and example, [Q B, 2]."""
        # the engine asks every example along its own version of a direction
        # [2 q, B] -> [q, 2, B] -> [q B, 2]: a row for every example of every direction
        return losses.view(self.num_directions, 2, -1).transpose(1, 2).reshape(-1, 2)
