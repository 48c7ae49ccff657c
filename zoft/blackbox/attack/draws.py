"""Random choices of a search: from zoft's counter, by seed and image, so that no image's luck depends on another's."""

from __future__ import annotations

import numpy as np

from zoft.noise import Direction, key_of, random_words

_AHEAD = 1024


class Draws:
    """A stream of random numbers.

    Args:
        seed: the attack's.
        image: number of the image.

    Example:
        >>> draws = Draws(0, 3)
        >>> sorted(draws.permutation(4).tolist()), 0 <= draws.integer(5) < 5
        ([0, 1, 2, 3], True)
    """

    def __init__(self, seed: int, image: int) -> None:
        self.key = key_of(Direction(seed, image), "image", role="attack")
        self.made = 0
        self.ahead = np.empty(0, np.uint64)  # a call of the generator costs more than the numbers

    def words(self, count: int) -> np.ndarray:
        """uint64 [count], below 2^32."""
        if count > len(self.ahead):
            start, self.made = self.made, self.made + max(count, _AHEAD)
            more = random_words(self.key, start, self.made).numpy().view(np.uint32).astype(np.uint64)
            self.ahead = np.concatenate([self.ahead, more])
        given, self.ahead = self.ahead[:count], self.ahead[count:]
        return given

    def integer(self, stop: int) -> int:
        """From 0 to stop - 1."""
        return int(self.words(1)[0]) * stop >> 32

    def signs(self, *shape: int) -> np.ndarray:
        """-1 or 1, float64."""
        return (self.words(int(np.prod(shape))) >> np.uint64(31)).astype(np.float64).reshape(shape) * 2 - 1

    def permutation(self, count: int) -> np.ndarray:
        """The numbers below count in random order."""
        return np.argsort(self.words(count), kind="stable")
