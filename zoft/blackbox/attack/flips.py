"""Sign flips: a perturbation of plus and minus the bound, of which blocks are turned, and kept if the loss is lower."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from zoft.blackbox.attack.draws import Draws
from zoft.blackbox.attack.search import Search
from zoft.blackbox.attack.subspaces import ImageSubspace


def flips(subspace: ImageSubspace, draws: Draws) -> Search:
    """All signs are turned at once, then those of each channel, of its quarters, sixteenths, ... down to single ones.

    The blocks of a level have their turns in random order; after the last level come the large ones again, and where
    no turn was worth it, it begins anew with random signs. SignHunter halves the signs' list instead of the image, in
    order; squares need fewer queries (docs/attack.md).

    Args:
        subspace: what z is.
        draws: its random choices.

    References: Al-Dujaili & O'Reilly 2020 (SignHunter), Algorithm 2; Moon, An & Song 2019, for corners of the ball.
    """
    z = np.ones(subspace.z_shape) if subspace.is_local else draws.signs(*subspace.z_shape)
    (best,) = yield [z]
    while True:
        before = best
        for blocks in _levels(subspace.z_shape):
            for number in draws.permutation(len(blocks)):
                other = z.copy()
                other[blocks[number]] *= -1
                (value,) = yield [other]
                if value < best:
                    z, best = other, value
        if best == before:
            z = draws.signs(*subspace.z_shape)
            (best,) = yield [z]


def _levels(shape: tuple[int, int, int]) -> list[list[tuple[slice, slice, slice]]]:
    """The blocks of z, from one that is all of it to single elements."""
    channels, height, width = shape
    whole = [(slice(None), slice(None), slice(None))]
    levels, count = [whole], 1 if channels > 1 else 2
    while True:
        rows, columns = _cut(height, count), _cut(width, count)
        levels.append([(slice(c, c + 1), r, k) for c in range(channels) for r in rows for k in columns])
        if count >= max(height, width):
            return levels
        count *= 2


def _cut(length: int, count: int) -> list[slice]:
    ends = np.linspace(0, length, min(length, count) + 1).round().astype(int)
    return [slice(a, b) for a, b in pairwise(ends)]
