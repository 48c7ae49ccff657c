"""The nouns at work on an image: `zoft.Minimizer` over the numbers of a perturbation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoft.blackbox.attack.searches import Search
from zoft.blackbox.attack.subspaces import ImageSubspace


@dataclass(frozen=True)
class Composition:
    """Parts by name, and their settings in units of the ball (its bound is 1).

    Args:
        estimator: None leaves all parts to `zoft.minimize`.
        subspace: of the nouns': ``full`` (random directions) or ``coordinate``.
        optimizer: what step is taken.
        num_directions: directions a step, or fewer where there are fewer coordinates.
        eps: by how much a query moves a number of z.
        learning_rate: None for an automatic step size.
    """

    estimator: str | None = None
    subspace: str | None = None
    optimizer: str | None = None
    num_directions: int | None = None
    eps: float | None = None
    learning_rate: float | None = None


def descent(
    subspace: ImageSubspace, parts: Composition, *, clean: float, bounded: bool, budget: int, seed: int
) -> Search:
    """The search that a composition makes; the loss of the image itself is known and not asked for again.

    Args:
        subspace: what z is.
        parts: the composition.
        clean: the loss at z = 0.
        bounded: each element of z stays within -1 and 1.
        budget: queries, with the one of the image itself.
        seed: of the directions.
    """
    from zoft.blackbox.minimizer import Minimizer  # a mistyped key is answered without torch

    search = Minimizer(
        np.zeros(subspace.z_shape),
        budget=budget,
        bounds=(-1.0, 1.0) if bounded else None,
        scale=1.0,
        noisy=False,
        seed=seed,
        **_given(parts, subspace),
    )
    try:
        while not search.done:
            points = search.ask()
            first = search.result().num_queries == 0
            search.tell([clean] if first else (yield points))
    finally:
        search.stop("target", "The aim is reached, or the budget is spent.")


def _given(parts: Composition, subspace: ImageSubspace) -> dict[str, Any]:
    n = subspace.num_elements
    eps = parts.eps
    if eps is not None and parts.subspace == "coordinate":
        eps /= math.sqrt(n)  # a coordinate moves by sqrt(n) eps in a query
    given = {
        "estimator": parts.estimator,
        "subspace": parts.subspace,
        "optimizer": parts.optimizer,
        "num_directions": None if parts.num_directions is None else min(n, parts.num_directions),
        "eps": eps,
        "learning_rate": parts.learning_rate,
        "radius": _FIRST_STEP * math.sqrt(n) if parts.learning_rate is None else None,
    }
    return {name: value for name, value in given.items() if value is not None}


_FIRST_STEP = 0.25  # of the bound, in each element
