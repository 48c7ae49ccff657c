"""Central differences at a random radius, weighted by a kernel that takes the O(eps^2) bias away (KerZOO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.component import Memory
from zoft.estimators.base import Point
from zoft.estimators.central import Central
from zoft.noise.direction import Direction, key_of


def kernel(r: float) -> float:
    """K(r) = 15/4 r (5 - 7 r^2): for r uniform on [-1, 1], E[r K] = 1 and E[r^3 K] = 0.

    E[r^2], E[r^4], E[r^6] are 1/3, 1/5, 1/7, so E[r K] = 15/4 (5/3 - 7/5) = 1 and E[r^3 K] = 15/4 (5/5 - 7/7) = 0.

    Example:
        >>> kernel(1.0), kernel(-1.0), kernel(0.0)
        (-7.5, 7.5, 0.0)
    """
    # K(r) = 15/4 r (5 - 7 r^2): E[r K] = 1 and E[r^3 K] = 0 for r uniform on [-1, 1]
    return 3.75 * r * (5 - 7 * r * r)


def radius(direction: Direction) -> float:
    """r, uniform on (-1, 1), from the direction's name alone."""
    # 64 random bits to the middle of one of 2^64 cells of (-1, 1): never exactly 0 or an end
    return (key_of(direction, "", role="kernel.r") + 0.5) * 2.0**-63 - 1


@dataclass
class Kernel(Central):
    """Central differences at radii r_j eps with weights K(r_j): 2 q queries a step, bias O(eps^4), variance 6.25 fold.

    g_j = (L(theta + eps r_j z_j) - L(theta - eps r_j z_j)) / (2 eps) K(r_j), r_j uniform on [-1, 1]. The difference is
    r z^T grad L + eps^2 r^3 D^3 L[z, z, z] / 6 + O(eps^4), and the kernel has E[r K] = 1 and E[r^3 K] = 0. What it
    pays: E[(r K)^2] = 25/4, so the slopes are as noisy as those of a sixth of the directions. That is worth it only
    where eps is so large that the bias of ``central`` is seen.

    ``projected_grads`` are without K(r_j): the kernel is put on the coefficients, behind the weighting.

    References: KerZOO (arXiv 2505.18886); the kernel is Legendre's of order 3, Bach & Perchet 2016, section 3.
    """

    measures_slopes: ClassVar[bool] = False

    def points(self, directions: list[Direction]) -> list[Point]:
        """+ r_j eps and - r_j eps along each direction."""
        # theta +- eps r_j z_j; the differences are over 2 eps and not 2 eps r: K(r) has the factor of r
        return [Point(d, sign * radius(d) * self.eps) for d in directions for sign in (1.0, -1.0)]

    def terms(self, terms: list[tuple[Direction, float]], state: Memory) -> list[tuple[Direction, float]]:
        """Each coefficient times K(r_j)."""
        del state
        # c_j <- c_j K(r_j), once the weighting has made c_j of the plain differences
        return [(direction, coefficient * kernel(radius(direction))) for direction, coefficient in terms]
