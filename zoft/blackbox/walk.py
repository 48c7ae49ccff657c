"""A method walking over a function: its parts bound to the numbers that are searched, one step after another."""

from __future__ import annotations

from dataclasses import replace

from zoft.blackbox.session import Ask, FunctionSession, check_method
from zoft.blackbox.space import Space
from zoft.errors import UserError
from zoft.estimators.base import Estimator
from zoft.step.estimate import StepEstimate
from zoft.step.method import Method
from zoft.step.query import StepQueries
from zoft.step.update import ZOOptimizer
from zoft.utils.lazy import Tensor, torch

_SPACINGS = 32  # of x0 that a query is away at least


class Walk:
    """A composition at some point, with what its parts remember.

    Args:
        space: what x is.
        method: the composition.
        ask: answers points with values.
        seed: of the directions.
        first_step: number of the first step: directions of one search are never used twice.
    """

    def __init__(self, space: Space, method: Method, ask: Ask, seed: int, first_step: int = 0) -> None:
        check_method(method)
        self.space, self.method, self.seed = space, method, seed
        coordinates = method.bind(space.weights())
        self.session = FunctionSession(space, coordinates, ask)
        rule = method.optimizer
        groups = [{"params": list(self.tensors.values()), "weight_decay": rule.weight_decay or 0.0}]
        self.zo_optimizer = ZOOptimizer(groups, rule, self.session, 0.0)
        self.queries = StepQueries(method, self.zo_optimizer)
        self.zo_optimizer.progress.steps = first_step

    @property
    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """u, by name."""
        return self.session.weights.tensors

    @property
    def step(self) -> int:
        """Number of the next step."""
        return self.zo_optimizer.progress.steps

    @property
    def reach(self) -> float:
        """How far a direction goes in the coordinate that it moves most, about."""
        d = self.session.weights.num_elements
        return float(d**0.5) if self.method.subspace.name() == "coordinate" else 1.0

    @property
    def least_eps(self) -> float:
        """Below it the rounding of x0 in the user's dtype is more than a few hundredths of a difference."""
        return _SPACINGS * max(float(gap.max()) for gap in self.space.spacing().values()) / self.reach

    # ---- where it stands ---------------------------------------------------------------------------------------------

    def vector(self) -> Tensor:
        """u as one vector, a copy."""
        return torch.cat([tensor.data.reshape(-1) for tensor in self.tensors.values()])

    def put(self, vector: Tensor, value: float | None = None) -> None:
        """Move to u, or to the nearest point within bounds.

        Args:
            vector: u.
            value: f there, if it is known and always the same.
        """
        start = 0
        for tensor in self.tensors.values():
            tensor.data.copy_(vector[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        self.space.project_({name: tensor.data for name, tensor in self.tensors.items()})
        self.session.clean = value

    def value(self) -> float:
        """f at the current point; one query, NaN if it fails."""
        return self.session.ask([self.session.at()])[0]

    def free(self, gradient: Tensor, here: Tensor) -> Tensor:
        """Which elements of u a step against the gradient can move: not those that are held by a bound; bool [d]."""
        self.put(here - gradient)
        free = (self.vector() != here) | (gradient == 0)
        self.put(here)
        return free

    # ---- a step ------------------------------------------------------------------------------------------------------

    def cost(self, estimator: Estimator) -> int:
        """Queries of the next step."""
        known = self.session.clean is not None and estimator.asks_clean_loss
        trials = self.method.queries_at(self.step) - self.method.estimator.queries_at(self.step)
        return estimator.queries_at(self.step) + trials - known

    def fitting(self, estimator: Estimator, queries: int) -> Estimator | None:
        """The estimator with as many of its directions as ``queries`` pay for; None where they pay for none."""
        if self.cost(estimator) <= queries:
            return estimator
        remembers = bool(estimator.init()) or bool(self.method.weighting.init())
        if remembers or estimator.across == "antithetic" or estimator.num_directions == 1:
            return None
        one = replace(estimator, num_directions=2, across="iid")
        each = one.queries_at(self.step) // one.num_directions
        count = estimator.num_directions - -(-(self.cost(estimator) - queries) // each)
        try:
            return replace(estimator, num_directions=count)
        except UserError:  # it takes more directions than that
            return None

    def ask(self, estimator: Estimator, lr: float = 0.0, *, penalises: bool = True) -> StepEstimate:
        """The queries of a step; :meth:`write` takes it.

        Args:
            estimator: the method's own, or one with another radius or fewer directions.
            lr: learning rate, for optimizers that try their step.
            penalises: whether a point where f fails counts as a worse one, unless it fails at all of them.
        """
        self.session.penalises = penalises
        try:
            return self.queries.estimate(None, estimator.directions(self.seed, self.step), estimator, lr=lr)
        finally:
            self.zo_optimizer.progress.steps += 1

    def write(self, estimate: StepEstimate, lr: float, *, project: bool = True) -> Tensor:
        """Take a step.

        Args:
            estimate: what :meth:`ask` gave.
            lr: learning rate.
            project: come back into the bounds.

        Returns:
            How u has moved, one vector.
        """
        before = self.vector()
        for group in self.zo_optimizer.param_groups:
            group["lr"] = lr
        self.zo_optimizer.apply(estimate)
        if project:
            self.put(self.vector())
        self.session.clean = None
        return self.vector() - before
