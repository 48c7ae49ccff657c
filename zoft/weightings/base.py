"""What every weighting promises: one coefficient per direction from what the losses say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from zoft.component import Component, Memory
from zoft.estimators.base import Measured
from zoft.utils.lazy import Tensor

Gram = Callable[[], "Tensor"]
"""The inner products <z_i, z_j> of the step's directions, float64 [Q, Q], made when they are asked for."""


@dataclass
class Weighting(Component):
    """How slopes along directions become the coefficients a_j of the estimate sum_j a_j z_j."""

    asks_gram: ClassVar[bool] = False
    """Whether it asks for inner products of directions, which are sums over all tensors."""

    def check_with(self, method: Any) -> None:
        """Refuse the other parts of a :class:`zoft.step.method.Method` that make no sense with this weighting."""

    def init(self) -> Memory:
        """The weighting's memory before the first step: plain numbers; empty for most."""
        return {}

    def coefficients(self, measured: Measured, gram: Gram, state: Memory) -> Tensor:
        """The coefficients, float32 [Q].

        Args:
            measured: what the losses of the step say.
            gram: makes the inner products of the step's directions.
            state: what :meth:`init` gave; updated in place.
        """
        raise NotImplementedError


def by_direction(scores: Tensor) -> Tensor:
    """One score a direction, [Q, ...], of those of its points [Q, S, ...]: s_j, or (s+_j - s-_j) / 2 of two sides."""
    return scores[:, 0] if scores.shape[1] == 1 else (scores[:, 0] - scores[:, 1]) / 2
