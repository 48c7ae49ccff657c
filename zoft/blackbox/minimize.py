"""`zoft.minimize`: minimise a function by its values alone, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoft.blackbox.calls import Calls
from zoft.blackbox.minimizer import Callback, Minimizer
from zoft.blackbox.result import Result
from zoft.estimators.base import Estimator
from zoft.optimizers.base import Optimizer
from zoft.subspaces.base import Subspace
from zoft.weightings.base import Weighting


def minimize(
    f: Callable[[Any], Any],
    x0: Any,
    *,
    budget: int = 1000,
    bounds: Any = None,
    bounds_by: str = "projection",
    scale: float | Any | Mapping[str, Any] | None = None,
    estimator: str | Estimator | None = None,
    subspace: str | Subspace | None = None,
    weighting: str | Weighting | None = None,
    optimizer: str | Optimizer | None = None,
    num_directions: int | None = None,
    eps: float | None = None,
    learning_rate: float | None = None,
    schedule: str = "constant",
    radius: float | None = None,
    noisy: bool | None = None,
    target: float | None = None,
    vectorized: bool = False,
    workers: int = 1,
    parallel: str = "threads",
    callback: Callback | None = None,
    seed: int = 0,
) -> Result:
    """Minimise a function of a vector, or of a dict of arrays, by its values alone.

    Left alone, it chooses composition, radius and step size by itself (docs/blackbox.md says how, and what that was
    measured on). With ``learning_rate`` it is the textbook's iteration x <- x - learning_rate * estimate, with the
    parts that are named. f(x0) is the first query.

    Args:
        f: x -> one finite number. x has dtype, shape and kind (numpy or torch) of x0, and is f's own. With
            ``vectorized``, n points stacked in front, [n, ...] -> n numbers [n].
        x0: where to begin: an array or tensor of floats, a sequence of numbers, or a dict of these. It is not changed.
        budget: most queries (calls of f, or points where vectorized) that are made.
        bounds: a tuple (lower, upper) of numbers or arrays like x0, None for no bound; or a list of pairs, one for each
            element; or an object with ``lb`` and ``ub``; or a dict of these by name.
        bounds_by: projection (queries and steps are moved to the nearest point within bounds) or reparameterize (a
            change of variable without bounds; eps and learning_rate are then in units of the new variable).
        scale: by how much x changes when the variable that is searched changes by one: a number, an array like x0, or a
            dict. Left out it is 1; a quarter of the width where two bounds are kept by projection and neither eps nor
            learning_rate is given.
        estimator: name or component: central, one_sided, one_point, three_point, leave_one_out, kernel, ...
        subspace: name or component: full (random directions; its law is gaussian, rademacher or sphere), coordinate
            (coordinate-wise differences, all coordinates in one step unless num_directions says less), low_rank, ...
        weighting: name or component.
        optimizer: name or component.
        num_directions: directions a step, q; for an estimator given by name.
        eps: radius h of the differences, in units of x / scale; for an estimator given by name. A coordinate moves by
            sqrt(d) h in subspace=coordinate, where directions are as long as random ones. Left out it is 1e-3 with a
            given learning rate, and follows the step size with an automatic one.
        learning_rate: step size, in units of x / scale per unit of the estimate; automatic if left out.
        schedule: how a given learning rate goes on: constant, linear or cosine (to zero at the end of the budget).
        radius: length of the first step of an automatic learning rate, in units of x / scale.
        noisy: whether f(x) differs from call to call; None finds out with a second query at x0.
        target: stop when a value is at or below it.
        vectorized: f takes stacked points.
        workers: how many points are evaluated at the same time; the result does not depend on it.
        parallel: what workers are: threads or processes.
        callback: called with the :class:`Result` as it stands after every step; returning True stops the search.
        seed: of the directions. Generators of numpy, torch and Python are not touched.

    Returns:
        A :class:`zoft.blackbox.result.Result`: x, fun, num_queries, history, message, success and more. What is found
        before f fails for good, or before Ctrl-C, is in it too.

    Raises:
        UserError: arguments that make no sense, an f without a finite number at x0, or a vectorised f that returns
            something else than n numbers.

    Example:
        >>> import numpy as np
        >>> def f(x):
        ...     return float(((x - np.array([1.0, -2.0])) ** 2).sum())
        >>> found = minimize(f, np.zeros(2), budget=200)
        >>> found.x.round(3).tolist(), found.success
        ([1.0, -2.0], True)

        The textbook's two-point form, (f(x + h u) - f(x - h u)) / 2h u with u uniform on the sphere of radius sqrt(d):

        >>> from zoft.subspaces.full import Full
        >>> found = minimize(f, np.zeros(2), estimator="central", subspace=Full(law="sphere"), eps=1e-4,
        ...                  learning_rate=0.1, budget=400)
        >>> found.fun < 1e-6
        True

    References: Nesterov & Spokoiny 2017 (random gradient-free minimization); Spall 1992 (SPSA).
    """
    parts = {"estimator": estimator, "subspace": subspace, "weighting": weighting, "optimizer": optimizer}
    search = Minimizer(
        x0,
        budget=budget,
        callback=callback,
        bounds=bounds,
        bounds_by=bounds_by,
        scale=scale,
        num_directions=num_directions,
        eps=eps,
        learning_rate=learning_rate,
        schedule=schedule,
        radius=radius,
        noisy=noisy,
        target=target,
        seed=seed,
        **parts,
    )
    with Calls(f, search.space.stacked if vectorized else None, workers, parallel) as calls:
        try:
            while not search.done:
                search.tell(calls(search.ask()))
        except KeyboardInterrupt:
            return search.stop("interrupted", "Interrupted; this is the best so far.", success=False)
    return search.result()
