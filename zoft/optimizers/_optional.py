"""Optional interfaces of optimizers: rescale coefficients, try the step before it is taken, work on factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from zoft.component import Memory
from zoft.optimizers._factors import Factors
from zoft.optimizers.base import State


class RescalesCoefficients:
    """A rule that makes other numbers of the coefficients themselves, once a step."""

    def init(self) -> Memory:
        """The rule's memory before the first step, for all tensors together: plain numbers."""
        raise NotImplementedError

    def coefficients(self, coefficients: list[float], scalars: Memory) -> list[float]:
        """The coefficients that the step is made with.

        Args:
            coefficients: of the step's directions.
            scalars: what :meth:`init` gave; updated in place.
        """
        raise NotImplementedError


class TriesSteps:
    """A rule that asks the objective where its step would lead, before the step is taken."""

    line_search: ClassVar[tuple[float, ...]]
    """Multiples of the step at which the objective is asked."""

    def choose(self, losses: Mapping[float, float]) -> float:
        """The multiple of the step to take.

        Args:
            losses: the objective at the clean weights (0.0) and at each of :attr:`line_search`.
        """
        raise NotImplementedError


class ReadsFactors:
    """A rule that makes the steps of all tensors together, from the factors of their gradients."""

    def steps(
        self, factors: Mapping[str, Factors], states: Mapping[str, State], loss: float, lr: float
    ) -> dict[str, Factors]:
        """The steps of all tensors, before the learning rate, as factors.

        Args:
            factors: of the gradient estimate, by tensor.
            states: of the same tensors; updated in place.
            loss: the clean loss of the batch.
            lr: the learning rate.
        """
        raise NotImplementedError


def line_search_of(optimizer: Any) -> tuple[float, ...]:
    """Multiples of the step at which the objective is asked before it is taken; empty for most rules."""
    # most rules take the step as it is
    return optimizer.line_search if isinstance(optimizer, TriesSteps) else ()
