"""The engine of a function of values: the objective at theta + scale * z is f at that point, asked of the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from zoft.blackbox.space import Space
from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.estimators._optional import KeepsAnchor
from zoft.estimators.base import Point
from zoft.estimators.per_example import PerExample
from zoft.step.method import Method
from zoft.subspaces.base import BoundSubspace
from zoft.utils.lazy import Tensor, torch
from zoft.weightings.per_prompt import PerPrompt
from zoft.weights.tensors import perturbed

Ask = Callable[[list[Any]], list[float]]
"""Points in the user's form -> f there; NaN where it failed."""

_BLOCK = 1 << 22  # elements of points that exist at a time: 32 MiB in float64


class FunctionSession(Session):
    """Losses are calls of f; they are float64, so that differences of near values keep their digits.

    Args:
        space: what x is.
        coordinates: the subspace bound to the space's weights.
        ask: answers points with values.
    """

    def __init__(self, space: Space, coordinates: BoundSubspace, ask: Ask) -> None:
        super().__init__(torch.nn.Module(), coordinates, _no_objective)
        self.space = space
        self.ask = ask
        self.clean: float | None = None  # f at the weights, where it is known and does not change
        self.penalises = False  # whether a point that fails counts as a worse one, as long as some do not fail
        self.num_failed = 0  # points of the last question that failed
        self._seen: list[float] = []  # f at the last points that did not

    def losses(self, batch: Any, points: Sequence[Point]) -> Tensor:
        """f at each point, float64 [P]; a known f at the weights is not asked for again."""
        del batch
        known = [self.clean if point.direction is None else None for point in points]
        wanted = [point for point, value in zip(points, known, strict=True) if value is None]
        size = max(1, _BLOCK // self.weights.num_elements)
        losses: list[float] = []
        for start in range(0, len(wanted), size):
            losses += self.ask([self.at(point) for point in wanted[start : start + size]])
        answers = iter(losses)
        values = [next(answers) if value is None else value for value in known]
        self.num_failed = sum(not math.isfinite(value) for value in values)
        return torch.tensor(self._with_penalties(values), dtype=torch.float64)

    def _with_penalties(self, values: list[float]) -> list[float]:
        """NaN replaced by the largest value that this question and the one before have seen."""
        seen = [value for value in values if math.isfinite(value)]
        around = seen + self._seen
        self._seen = seen or self._seen
        if not self.penalises or not seen or len(seen) == len(values) or max(around) == min(around):
            return values
        return [value if math.isfinite(value) else max(around) for value in values]

    def at(self, point: Point = Point()) -> Any:  # noqa: B008 - it is frozen
        """The user's x at a point."""
        direction, u = point.direction, {}
        for name, tensor in self.weights.tensors.items():
            u[name] = tensor.data
            if direction is not None and self.coordinates.moves(direction, name):
                u[name] = perturbed(tensor.data, self.coordinates.z(direction, name), point.scale)
        return self.space.x(u)


def _no_objective(batch: Any) -> Tensor:
    raise AssertionError("a function session asks")


def check_method(method: Method) -> None:
    """Refuse the parts that need more of an objective than values at points.

    Raises:
        UserError: derivatives, batches, examples or activations are needed.
    """
    estimator, subspace = method.estimator, method.subspace
    needs = None
    if estimator.backpropagates or any(p.derivative for p in estimator.points(estimator.directions(0, 0))):
        needs = f"estimator={estimator.name()} needs derivatives"
    elif isinstance(estimator, KeepsAnchor):
        needs = f"estimator={estimator.name()} needs batches of data"
    elif isinstance(estimator, PerExample):
        needs = f"estimator={estimator.name()} needs a loss for each example"
    elif isinstance(method.weighting, PerPrompt):
        needs = f"weighting={method.weighting.name()} needs a loss for each example"
    elif any(subspace.observes_at(step) == "gradient" for step in range(2)):
        needs = f"subspace={subspace.name()} as it is set needs a gradient"
    elif any(subspace.observes_at(step) == "inputs" for step in range(2)):
        needs = f"subspace={subspace.name()} needs the inputs of linear layers"
    if needs:
        raise UserError(
            f"{needs}, and f gives values only: use estimator=central, one_sided or one_point in subspace=full"
        )
    if estimator.noise != "counter":
        raise UserError(f"estimator.noise={estimator.noise} is MeZO's stream for weights; a function has noise=counter")
