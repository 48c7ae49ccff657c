"""Random squares: a square of random place and sign is set to the bound, and kept if the loss is lower."""

from __future__ import annotations

import numpy as np

from zoft.blackbox.attack.draws import Draws
from zoft.blackbox.attack.search import Search
from zoft.blackbox.attack.subspaces import ImageSubspace

_HALVED_AT = (0.001, 0.005, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8)  # of the budget: Square Attack's, of its 10,000


def squares(subspace: ImageSubspace, draws: Draws, *, budget: int, share: float = 0.3) -> Search:
    """Begins with vertical stripes; the squares become smaller as the budget is spent.

    Square Attack's rule for the L-inf ball. In the L2 ball it is the same walk over signs, on the ball's surface:
    simpler than the published L2 rule, which moves the mass of one square to another.

    Args:
        subspace: what z is.
        draws: its random choices.
        budget: queries, for the schedule.
        share: of the image that the first squares cover.

    References: Andriushchenko et al. 2020 (Square Attack), Algorithms 1 and 2, and the schedule of section 5.
    """
    channels, height, width = subspace.z_shape
    z = np.repeat(draws.signs(channels, 1, width), height, 1)
    (best,) = yield [z]
    asked = 1
    while True:
        covered = share / 2 ** sum(asked > part * budget for part in _HALVED_AT)
        side = max(1, min(height, width, round((covered * height * width) ** 0.5)))
        top, left = draws.integer(height - side + 1), draws.integer(width - side + 1)
        other = z.copy()
        window = other[:, top : top + side, left : left + side]
        window[:] = draws.signs(channels, 1, 1)
        if (other == z).all():
            window *= -1
        (value,) = yield [other]
        asked += 1
        if value < best:
            z, best = other, value
