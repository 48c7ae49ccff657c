"""One coordinate after another, each a step up or down: taken if the loss is lower."""

from __future__ import annotations

import math

import numpy as np

from zoft.blackbox.attack.draws import Draws
from zoft.blackbox.attack.search import Search
from zoft.blackbox.attack.subspaces import ImageSubspace

_STEP = 0.2  # of the ball's radius in l2


def greedy(subspace: ImageSubspace, draws: Draws, *, clean: float, bounded: bool) -> Search:
    """The coordinates of the subspace in random order, again and again; SimBA, and with low_frequency SimBA-DCT.

    Args:
        subspace: what z is.
        draws: its random choices.
        clean: the loss of the image itself.
        bounded: each element of z stays within -1 and 1, where the ball says so.

    References: Guo et al. 2019 (SimBA), Algorithm 1.
    """
    z, best, step = np.zeros(subspace.z_shape), clean, _STEP * math.sqrt(subspace.num_elements)
    while True:
        for place in draws.permutation(subspace.num_elements):
            for sign in (1, -1):
                other = z.copy()
                there = other.reshape(-1)
                there[place] += sign * step
                if bounded:
                    there[place] = min(1.0, max(-1.0, there[place]))
                    if there[place] == z.reshape(-1)[place]:
                        continue
                (value,) = yield [other]
                if value < best:
                    z, best = other, value
                    break
