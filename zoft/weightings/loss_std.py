"""Slopes divided by the spread of the losses: steps of one length, whatever the slope (FZOO, GRZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings._spread import refuse_one_loss, spread
from zoft.weightings.base import Gram, Weighting


@dataclass
class LossStd(Weighting):
    """a_j = p_j eps / (q sigma), sigma the spread of the step's losses: normalised descent, by numbers that are there.

    sigma is about eps times the length of the gradient, so the estimate is about as long as for a gradient of length
    one, and the learning rate says how far a step goes. Which spread:

    * one side (``one_sided``, ``leave_one_out``, ``one_point``): the population's standard deviation of L_j over the
      directions; with ``one_sided`` a_j = (L_j - L) / (q sigma), FZOO's step;
    * two sides (``central``, ``three_point``, ``per_example``, ``kernel``): the root mean square of (L+ - L-) / 2 over
      the directions, which leaves out what is common to a pair; a_j = p_j / (q rms(p)). One direction gives the
      slope's sign. With ``per_example`` q counts directions and examples, and this is GRZO's step, whose standard
      deviation of delta_i = L+_i - L-_i is 2 sigma; its learning rate is multiplied by 1 / (2 eps) once more;
    * exact slopes (``forward_gradient``), the limit of two sides: a_j = p_j / (q rms(p)), and the floor is one of p.

    Losses that tie say nothing: at sigma <= floor nothing moves.

    Args:
        floor: smallest spread that is believed, in units of the loss, >= 0; float32 losses have steps of about 1e-7.

    References: FZOO (arXiv 2506.09034), equation (4); GRZO (arXiv 2606.02857).
    """

    floor: float = 1e-6

    def check(self) -> None:
        """Refuse a negative floor."""
        self.require(0 <= self.floor < float("inf"), "floor", ">= 0 and finite")

    def check_with(self, method: Any) -> None:
        """Refuse one loss, which has no spread."""
        refuse_one_loss(self, method)

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """p eps / (q sigma)."""
        del gram, state
        slopes, sigma = measured.projected_grads, spread(measured)
        # losses that tie to float32's steps say nothing: dividing by their spread would be noise
        if float(sigma) <= self.floor:
            return torch.zeros_like(slopes)
        # exact slopes have no eps: the limit of two sides, where eps cancels against sigma
        eps = measured.eps if measured.losses.shape[1] else 1.0
        # a_j = p_j eps / (q sigma)
        return slopes * (eps / (len(slopes) * sigma))
