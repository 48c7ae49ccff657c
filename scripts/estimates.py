"""Many estimates of one gradient, whose mean and variance docs/mathematics.md derives and its tests measure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zoft.blackbox.session import check_method
from zoft.blackbox.space import VECTOR, Space
from zoft.estimators.base import Estimator
from zoft.noise.direction import Direction
from zoft.step.method import Method
from zoft.subspaces.base import Subspace
from zoft.utils.lazy import Tensor, torch


def estimates(
    f: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    estimator: str | Estimator = "central",
    subspace: str | Subspace = "full",
    count: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """The estimates that ``count`` steps at one and the same x would make.

    Args:
        f: n points [n, d] -> n numbers [n].
        x: where, float64 [d].
        estimator: name or component.
        subspace: name or component.
        count: how many steps.
        seed: of the directions.

    Returns:
        float64 [count, d].

    Raises:
        UserError: an estimator that needs more than values of f.

    Example:
        >>> found = estimates(lambda xs: xs @ np.array([3.0, 4.0]), np.zeros(2), count=500)
        >>> found.shape, bool(np.abs(found.mean(0) - [3.0, 4.0]).max() < 1.0)
        ((500, 2), True)
    """
    method = Method.of(subspace, estimator)
    check_method(method)
    coordinates, state = method.bind(Space(x).weights()), method.estimator.init()
    estimated = np.empty((count, len(x)))
    for step in range(count):
        directions = method.estimator.directions(seed, step)
        drawn = {direction: coordinates.z(direction, VECTOR).double().numpy() for direction in directions}
        losses = _losses(f, x, method.estimator, directions, drawn)
        coefficients = method.weighting.coefficients(method.estimator.measure(losses, state), _no_gram, {})
        terms = method.estimator.terms(list(zip(directions, coefficients.tolist(), strict=True)), state)
        estimated[step] = sum(coefficient * drawn[direction] for direction, coefficient in terms)
    return estimated


def _losses(
    f: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    estimator: Estimator,
    directions: list[Direction],
    drawn: dict[Direction, np.ndarray],
) -> Tensor:
    points = estimator.points(directions)
    moves = [0.0 if p.direction is None else p.scale * drawn[p.direction] for p in points]
    return torch.as_tensor(f(np.stack([x + move for move in moves])), dtype=torch.float64)


def _no_gram() -> Tensor:
    raise AssertionError("the mean asks for no inner products")
