"""Spaces of perturbations to search in: single pixels, squares of them, or waves of low frequency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from zoft.errors import UserError

SUBSPACES = ("pixels", "square", "low_frequency")
"""What the numbers of a perturbation stand for."""


@dataclass(frozen=True)
class ImageSubspace:
    """Perturbations delta = lift(z) of an image; z of ones and minus ones gives a delta of mean square 1.

    Args:
        kind: ``pixels``: z is delta. ``square``: z is a coarse image, each of its pixels a square of delta.
            ``low_frequency``: z has the lowest frequencies of delta's cosine transform (DCT-II).
        shape: (channels, height, width) of the image.
        grid: rows and columns of z, in each channel; 0 for the image's own (pixels).

    Raises:
        UserError: an unknown kind, and a grid that is finer than the image or has no place in pixels.

    Example:
        >>> ImageSubspace("square", (1, 4, 4), 2).lift(np.array([[[1.0, 2.0], [3.0, 4.0]]]))[0].astype(int).tolist()
        [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
        >>> wave = ImageSubspace("low_frequency", (1, 4, 4), 2).lift(np.array([[[1.0, -1.0], [1.0, 1.0]]]))
        >>> round(float((wave**2).mean()), 6)
        1.0

    References: Guo, Frank & Weinberger 2018 (low-frequency adversarial perturbation); Tu et al. 2019 (AutoZOOM), for
    searching in a coarser image.
    """

    kind: str
    shape: tuple[int, int, int]
    grid: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SUBSPACES:
            raise UserError(f"subspace must be one of {', '.join(SUBSPACES)}, got {self.kind!r}")
        side = min(self.shape[1:])
        if self.kind != "pixels" and not 1 <= self.grid <= side:
            raise UserError(f"grid must be from 1 to {side}, the image's shorter side, got {self.grid}")
        if self.kind == "pixels" and self.grid:
            raise UserError("grid has no effect with subspace=pixels: use subspace=square or low_frequency, or drop it")

    @property
    def z_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of z."""
        return (self.shape[0], self.grid, self.grid) if self.grid else self.shape

    @property
    def num_elements(self) -> int:
        """Numbers in z."""
        return math.prod(self.z_shape)

    @property
    def is_local(self) -> bool:
        """Whether an element of z is a place in the image."""
        return self.kind != "low_frequency"

    def lift(self, z: np.ndarray) -> np.ndarray:
        """Delta [c, h, w] of z."""
        if self.kind == "pixels":
            return z
        rows, columns = self._maps
        return np.einsum("ci,kij,jd->kcd", rows, z, columns.T, optimize=True)

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        factory = _steps if self.kind == "square" else _waves
        return factory(self.shape[1], self.grid), factory(self.shape[2], self.grid)


def _steps(length: int, count: int) -> np.ndarray:
    """[length, count]: which of the intervals a place lies in."""
    return np.eye(count)[np.arange(length) * count // length]


def _waves(length: int, count: int) -> np.ndarray:
    """[length, count]: the first columns of the orthonormal DCT-III, scaled to a mean square of 1 over the columns."""
    waves = np.cos(np.pi * (np.arange(length)[:, None] + 0.5) * np.arange(count) / length) * math.sqrt(2 / length)
    waves[:, 0] /= math.sqrt(2)
    return waves * math.sqrt(length / count)
