"""The bound on a perturbation: at most ``radius`` in a norm, and the pixels stay in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from zoft.errors import UserError

NORMS = ("linf", "l2")
"""Largest change of a pixel; root of the sum of squared changes over all pixels and channels."""

_STRETCHES = 5


@dataclass(frozen=True)
class Ball:
    """Images near an image.

    Args:
        norm: one of :data:`NORMS`.
        radius: > 0; pixels are in [0, 1].

    Raises:
        UserError: another norm, or a radius that is not > 0 and finite, or leaves nothing of the image.

    Example:
        >>> image, delta = np.array([0.5, 0.9]), np.array([3.0, 4.0])
        >>> Ball("linf", 0.2).moved(image, delta).round(2).tolist(), Ball("l2", 1.0).moved(image, delta / 10).tolist()
        ([0.7, 1.0], [0.8, 1.0])
    """

    norm: str
    radius: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if not 0 < self.radius < math.inf:
            raise UserError(f"radius must be > 0 and finite (pixels are in [0, 1]), got {self.radius:g}")
        if self.norm == "linf" and self.radius >= 1:
            raise UserError(f"radius={self.radius:g} in norm=linf lets every image become any other: give one below 1")

    def unit(self, num_elements: int) -> float:
        """How far each pixel may go if all of them go as far."""
        return self.radius if self.norm == "linf" else self.radius / math.sqrt(num_elements)

    def size(self, delta: np.ndarray) -> float:
        """The norm of a perturbation."""
        return float(abs(delta).max() if self.norm == "linf" else np.linalg.norm(delta.ravel()))

    def moved(self, image: np.ndarray, delta: np.ndarray, *, fill: bool = False) -> np.ndarray:
        """The image with a perturbation, brought inside the ball and into [0, 1].

        Args:
            image: in [0, 1].
            delta: of the same shape.
            fill: go as far as the ball allows: to its corner of these signs (linf), to its surface in this direction
                as far as the pixels' own bounds let it (l2).
        """
        delta = np.asarray(delta, np.float64)
        if self.norm == "linf":
            return np.clip(
                image + (self.radius * np.sign(delta) if fill else np.clip(delta, -self.radius, self.radius)), 0, 1
            )
        for _ in range(_STRETCHES if fill else 1):
            size = self.size(delta)
            if size and (fill or size > self.radius):
                delta = delta * (self.radius / size)
            delta = np.clip(image + delta, 0, 1) - image  # what a pixel cannot take, the others get in the next round
        return image + delta
