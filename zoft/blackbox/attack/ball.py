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


# ---- What an attack is after: another label than the right one, or a certain one; and the loss that leads there ------

LOSSES = ("margin", "cross_entropy")
"""How near an image is to the aim; lower is nearer."""


@dataclass(frozen=True)
class Aim:
    """The aim for one image.

    Args:
        label: the right class.
        target: the class that is wanted; None for any but the right one.
        loss: ``margin`` is log p(wrong way) - log p(wanted way), negative exactly where the label has changed:
            log p_label - max of the others', or max of the others' - log p_target. ``cross_entropy`` is log p_label
            (the true class's loss, maximised), or -log p_target.

    Example:
        >>> aim = Aim(label=0)
        >>> aim.losses(np.log([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]])).round(3).tolist()
        [0.693, -0.693]
        >>> aim.reached(np.log([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]])).tolist()
        [False, True]

    References: Carlini & Wagner 2017, section V.A, for the margin; Chen et al. 2017 (ZOO), equations (4), (5).
    """

    label: int
    target: int | None = None
    loss: str = "margin"

    def losses(self, log_probabilities: np.ndarray) -> np.ndarray:
        """One number for each row of [n, classes]."""
        ours = self.label if self.target is None else self.target
        toward = 1.0 if self.target is None else -1.0
        if self.loss == "cross_entropy":
            return toward * log_probabilities[:, ours]
        others = np.delete(log_probabilities, ours, axis=1).max(1)
        return toward * (log_probabilities[:, ours] - others)

    def reached(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Whether it is reached, for each row of [n, classes]."""
        predicted = log_probabilities.argmax(1)
        return predicted != self.label if self.target is None else predicted == self.target
