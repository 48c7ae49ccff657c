"""The settings of a search, checked together; and the composition that they stand for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from zoft.blackbox.session import check_method
from zoft.blackbox.space import Space
from zoft.component import Component, components, create
from zoft.errors import UserError, did_you_mean
from zoft.estimators.base import Estimator, FiniteDifference
from zoft.optimizers._optional import line_search_of
from zoft.optimizers.base import Optimizer
from zoft.step.method import Method
from zoft.subspaces.base import Subspace
from zoft.weightings.base import Weighting

SCHEDULES = ("constant", "linear", "cosine")
"""How a given learning rate goes on, from its value to zero over the budget."""


@dataclass(frozen=True)
class MinimizeSettings:
    """How a search goes; see :func:`zoft.minimize`."""

    budget: int
    estimator: str | Estimator | None = None
    subspace: str | Subspace | None = None
    weighting: str | Weighting | None = None
    optimizer: str | Optimizer | None = None
    num_directions: int | None = None
    eps: float | None = None
    learning_rate: float | None = None
    schedule: str = "constant"
    radius: float | None = None
    noisy: bool | None = None
    target: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, **given: Any) -> MinimizeSettings:
        """From keyword arguments; refuses unknown ones, and those that would have no effect."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"there is no argument {name}.{did_you_mean(name, known)}")
        settings = cls(**given)
        settings._check()
        return settings

    def _check(self) -> None:
        for name in ("num_directions", "eps"):
            if getattr(self, name) is not None and isinstance(self.estimator, Estimator):
                raise UserError(f"{name} belongs to the estimator that is given: set it there, or give its name")
        rate = self.optimizer.learning_rate if isinstance(self.optimizer, Optimizer) else None
        if self.learning_rate is not None and rate is not None:
            raise UserError("learning_rate is given twice: here, and in the optimizer")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise UserError(
                f"learning_rate must be > 0 and finite, got {self.rate!r}; leave it out for an automatic one"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.schedule != "constant" and self.rate is None:
            raise UserError(
                f"schedule={self.schedule} is that of a given learning rate: give learning_rate, or drop it"
            )
        if self.radius is not None and self.rate is not None:
            raise UserError(
                "radius is the first step of an automatic learning rate, and learning_rate is given: drop one"
            )
        if self.radius is not None and not 0 < self.radius < float("inf"):
            raise UserError(f"radius must be > 0 and finite, got {self.radius!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"seed must be a whole number, got {self.seed!r}")
        if self.target is not None and not (isinstance(self.target, (int, float)) and self.target <= float("inf")):
            raise UserError(f"target must be a number, got {self.target!r}")

    @property
    def rate(self) -> float | None:
        """The learning rate that is given, here or in the optimizer."""
        of_optimizer = self.optimizer.learning_rate if isinstance(self.optimizer, Optimizer) else None
        return self.learning_rate if of_optimizer is None else of_optimizer

    @property
    def chooses_parts(self) -> bool:
        """Whether any part of the composition is given."""
        parts = (self.estimator, self.subspace, self.weighting, self.optimizer, self.num_directions)
        return any(part is not None for part in parts)

    @property
    def fixes_eps(self) -> bool:
        """Whether the radius of the differences is given, or follows from what is given."""
        return self.eps is not None or isinstance(self.estimator, Estimator) or self.rate is not None

    def method(self, space: Space) -> Method:
        """The composition: what is given, and for the rest central differences in all coordinates, mean and SGD."""
        method = Method(
            _part("subspace", self.subspace, "full"),
            self._estimator(space),
            _part("weighting", self.weighting, "mean"),
            _part("optimizer", self.optimizer, "sgd"),
        )
        check_method(method)
        least = method.queries_at(0)
        if least > self.budget:
            estimator = method.estimator
            raise UserError(
                f"budget={self.budget} is less than one step costs: estimator={estimator.name()} with num_directions="
                f"{estimator.num_directions} makes {least} queries a step: raise budget, or take fewer directions"
            )
        if self.rate is None and line_search_of(method.optimizer):
            raise UserError(f"optimizer={method.optimizer.name()} tries steps of its learning rate: give learning_rate")
        if self.fixes_eps and method.estimator.radius:
            reach = space.num_elements**0.5 if method.subspace.name() == "coordinate" else 1.0
            space.check_eps(method.estimator.radius, reach)
        return method

    def _estimator(self, space: Space) -> Estimator:
        if isinstance(self.estimator, Estimator):
            return self.estimator
        name = "central" if self.estimator is None else self.estimator
        given = {"num_directions": self.num_directions, "eps": self.eps}
        fields = {field: value for field, value in given.items() if value is not None}
        cls = components("estimator").get(name) if isinstance(name, str) else None
        if cls is not None and self.eps is not None and not issubclass(cls, FiniteDifference):
            raise UserError(f"estimator={name} has no eps: leave it out")
        estimator = create("estimator", name, "central", **fields)
        if self.num_directions is None and self._moves_coordinates():
            return self._sweep(estimator, space.num_elements)
        return estimator

    def _moves_coordinates(self) -> bool:
        return self.subspace == "coordinate" or (
            isinstance(self.subspace, Subspace) and self.subspace.name() == "coordinate"
        )

    def _sweep(self, estimator: Estimator, d: int) -> Estimator:
        """Every coordinate once a step, or as many as the budget pays for."""
        whole = replace(estimator, num_directions=d)
        least = whole.queries_at(0) + 1
        return whole if least <= self.budget else replace(whole, num_directions=max(1, d * self.budget // least - 1))


def _part(group: str, choice: Any, default: str) -> Any:
    if choice is not None and not isinstance(choice, (str, Component)):
        raise UserError(f"{group} must be a name or a component, got {type(choice).__name__}")
    part = create(group, choice, default)
    wanted = {"subspace": Subspace, "weighting": Weighting, "optimizer": Optimizer, "estimator": Estimator}[group]
    if not isinstance(part, wanted):
        raise UserError(f"{group}={part.name()} is no {group}: give it as what it is")
    return part
