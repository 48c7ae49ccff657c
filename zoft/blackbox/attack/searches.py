"""Searches as generators: each yields the perturbations it wants evaluated and is sent their losses."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import pairwise

import numpy as np

from zoft.blackbox.attack.subspaces import ImageSubspace
from zoft.noise.counter import random_words
from zoft.noise.direction import Direction, key_of

Search = Generator[list[np.ndarray], Sequence[float], None]
"""Yields z's [channels, rows, columns] of the subspace, in units of the ball (its bound is 1), and is sent one loss for
each. It need not end: the budget does that."""


# ---- Random squares: a square of random place and sign is set to the bound, and kept if the loss is lower ------------

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


# ---- Sign flips: a perturbation of plus and minus the bound, of which blocks are turned, and kept if the loss is lower


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


# ---- One coordinate after another, each a step up or down: taken if the loss is lower --------------------------------

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
                flat = other.reshape(-1)
                flat[place] += sign * step
                if bounded:
                    flat[place] = min(1.0, max(-1.0, flat[place]))
                    if flat[place] == z.reshape(-1)[place]:
                        continue
                (value,) = yield [other]
                if value < best:
                    z, best = other, value
                    break


# ---- Random choices of a search: from zoft's counter, by seed and image, so that no image's luck depends on another's

_AHEAD = 1024


class Draws:
    """A stream of random numbers.

    Example:
        >>> draws = Draws(0, 3)
        >>> sorted(draws.permutation(4).tolist()), 0 <= draws.integer(5) < 5
        ([0, 1, 2, 3], True)
    """

    def __init__(self, seed: int, image: int) -> None:
        self.key = key_of(Direction(seed, image), "image", role="attack")
        self.num_made = 0
        self.ahead = np.empty(0, np.uint64)  # a call of the generator costs more than the numbers

    def words(self, count: int) -> np.ndarray:
        """uint64 [count], below 2^32."""
        if count > len(self.ahead):
            start, self.num_made = self.num_made, self.num_made + max(count, _AHEAD)
            more = random_words(self.key, start, self.num_made).numpy().view(np.uint32).astype(np.uint64)
            self.ahead = np.concatenate([self.ahead, more])
        given, self.ahead = self.ahead[:count], self.ahead[count:]
        return given

    def integer(self, stop: int) -> int:
        """A random integer from 0 to stop - 1."""
        return int(self.words(1)[0]) * stop >> 32

    def signs(self, *shape: int) -> np.ndarray:
        """-1 or 1, float64."""
        return (self.words(int(np.prod(shape))) >> np.uint64(31)).astype(np.float64).reshape(shape) * 2 - 1

    def permutation(self, count: int) -> np.ndarray:
        """The numbers below count in random order."""
        return np.argsort(self.words(count), kind="stable")
