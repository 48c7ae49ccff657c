"""What a search is: a generator that yields perturbations and is sent their losses."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

Search = Generator[list[np.ndarray], Sequence[float], None]
"""Yields z's [channels, rows, columns] of the subspace, in units of the ball (its bound is 1), and is sent one loss for
each. It need not end: the budget does that."""
