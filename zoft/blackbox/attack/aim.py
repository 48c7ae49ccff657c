"""What an attack is after: another label than the right one, or a certain one; and the loss that leads there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        found = log_probabilities.argmax(1)
        return found != self.label if self.target is None else found == self.target
