"""A Kalman filter over the step's directions: slopes shrunk by how noisy they have turned out to be (BSZO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.component import Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor, torch
from zoft.weightings.align import refuse_no_slopes
from zoft.weightings.base import Gram, Weighting

_DEPENDENT = 1e-9  # of the prior's variance: what is left of it along a direction that others span already


@dataclass
class Kalman(Weighting):
    """a = b / q, b the posterior mean of the slopes along the directions' axes, observed with noise one by one.

    With D the directions' mean squared length, the axes z_j / sqrt(D) carry the gradient's part in their span as
    sum_i b_i z_i / D. The slopes that are measured are then p = R b + noise with R = <z_i, z_j> / D. From the prior
    b ~ N(0, prior^2 I) and noise of variance s, each slope is taken up in turn (h the j-th row of R):

        r = p_j - h b;   K = C h / (h C h + s);   b <- b + K r;   C <- C - K h C;   s <- (1 - memory) s + memory r^2.

    s begins at noise^2 and goes on from step to step: r^2 is what the slopes before did not foretell, so where slopes
    are large against the prior they shrink, as 1 / (1 + s / prior^2) for directions at right angles. With noise=0 and
    memory=0 it is R^-1 p, the projection of the gradient on the span at the length that ``mean`` has: directions at
    right angles give the mean itself, and learning rates carry over.

    Args:
        prior: standard deviation of the slopes that is expected before any is seen (the paper's sigma_p), > 0.
        noise: standard deviation of their noise at the start (the paper's sigma_e), >= 0.
        memory: weight of the newest residual in the noise's variance, in [0, 1); 0 leaves it as it is.

    References: BSZO (arXiv 2601.01452); Kalman 1960.
    """

    asks_gram: ClassVar[bool] = True

    prior: float = 1.0
    noise: float = 1.0
    memory: float = 0.1

    def check(self) -> None:
        """Refuse values outside of their ranges."""
        self.require(0 < self.prior < float("inf"), "prior", "> 0 and finite")
        self.require(0 <= self.noise < float("inf"), "noise", ">= 0 and finite")
        self.require(0 <= self.memory < 1, "memory", "in [0, 1)")

    def check_with(self, method: Any) -> None:
        """Refuse estimators without slopes."""
        refuse_no_slopes(self, method)

    def init(self) -> Memory:
        """The variance of the noise."""
        # of the slopes' noise: s = noise^2 before the first step
        return {"variance": self.noise**2}

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """b / q, filtered in float64."""
        slopes, products = measured.projected_grads, gram().double().cpu()
        length = float(products.diagonal().mean())  # D
        if not length:  # nothing moves along any direction
            return torch.zeros_like(slopes)
        observe, values = products / length, slopes.double().tolist()  # R, p
        mean = torch.zeros(len(values), dtype=torch.float64)  # b
        covariance = self.prior**2 * torch.eye(len(values), dtype=torch.float64)  # C
        for row, value in zip(observe, values, strict=True):
            residual = value - float(row @ mean)  # r
            # C h, with h the j-th row of R
            along = covariance @ row
            # h C h + s
            variance = float(row @ along) + state["variance"]
            # a direction that others span already has nothing more to say, and would divide by zero
            if variance > _DEPENDENT * self.prior**2:
                # b <- b + K r and C <- C - K h C, with K = C h / (h C h + s)
                mean += along * (residual / variance)
                covariance -= torch.outer(along, along) / variance
            # s <- (1 - memory) s + memory r^2
            state["variance"] = (1 - self.memory) * state["variance"] + self.memory * residual**2
        # a = b / q
        return (mean / len(values)).to(slopes.dtype)
