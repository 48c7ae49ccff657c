"""The interfaces of bound subspaces whose bases or masks follow from the model: from its inputs, or from gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoft.noise.direction import Direction
from zoft.utils.lazy import Tensor


class ObservesInputs:
    """A bound subspace that is shown inputs of linear layers, in a clean forward before the queries of a step."""

    def inputs_wanted(self, direction: Direction) -> frozenset[str]:
        """Tensors whose linear layers' inputs this step's basis is built from; empty: no forward is made for it."""
        raise NotImplementedError

    def observe(self, direction: Direction, name: str, inputs: Tensor) -> None:
        """The inputs of a linear layer in the clean forward.

        Args:
            direction: a direction of the step.
            name: the layer's weight.
            inputs: [tokens, n], in the model's dtype; not to be kept or overwritten.
        """
        raise NotImplementedError

    def join(self, direction: Direction, gather: Callable[[Any], list[Any]]) -> None:
        """Put together what the layers have seen in this process and in the others.

        Args:
            direction: a direction of the step.
            gather: something of this process -> that of all of them, by rank.
        """
        raise NotImplementedError


class ObservesGradients:
    """A bound subspace that is shown the gradients of a backward pass, before the queries of a step."""

    def gradients_wanted(self, direction: Direction) -> bool:
        """Whether a backward pass is to be made before the queries of this step."""
        raise NotImplementedError

    def score(self, name: str, gradient: Tensor) -> None:
        """The gradient of a tensor; not to be kept."""
        raise NotImplementedError

    def scored(self) -> None:
        """All gradients have been given."""
        raise NotImplementedError
