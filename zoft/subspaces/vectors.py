"""The vectors: normalisation weights and biases move, matrices stand still."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.noise.source import NoiseSource
from zoft.subspaces._partial import BoundPartial
from zoft.subspaces.base import Subspace
from zoft.weights.tensors import Weights


@dataclass
class Vectors(Subspace):
    """Trained tensors of one dimension (normalisation weights, biases) move in full; matrices stand still.

    They are a few thousandths of a model's numbers, so that an estimate from few queries says more of each. Other than
    ``trainable=norms_and_biases``, which holds for every method, this restricts the directions of one method.

    Adapters' and prompts' own tensors of one dimension move too; a model without any is refused.

    References: Ben-Zaken et al. 2022 (BitFit, arXiv 2106.10199) and Zhao et al. 2024 (tuning LayerNorm, arXiv
    2312.11420), for backpropagation.
    """

    has_matrices: ClassVar[bool] = False
    serves_sequential: ClassVar[bool] = True

    def bind(self, weights: Weights, noise: str = "counter") -> BoundVector:
        """Coordinates are the elements of the vectors."""
        return BoundVector(weights, self.source(weights, noise))


class BoundVector(BoundPartial):
    """The full space restricted to tensors of one dimension.

    Raises:
        UserError: none of the trained tensors has one dimension.

    Example:
        >>> import torch
        >>> coordinates = Vectors().bind(Weights(torch.nn.Linear(3, 2)))
        >>> [name for name in coordinates.weights.tensors if coordinates.moves(Direction(0, 0), name)]
        ['bias']
    """

    def __init__(self, weights: Weights, source: NoiseSource) -> None:
        super().__init__(weights, source)
        # a model without vectors would take steps in which nothing moves
        if not any(map(self.ever_moves, weights.tensors)):
            raise UserError(
                "subspace=vectors moves normalisation weights and biases, and none of the trained tensors is one (they "
                f"have names such as {next(iter(weights.tensors))}): train them too (trainable=all), or use "
                "subspace=full"
            )

    def moves(self, direction: Direction, name: str) -> bool:
        """Whether ``name`` is a vector."""
        return self.ever_moves(name) and super().moves(direction, name)

    def ever_moves(self, name: str) -> bool:
        """Whether ``name`` has one dimension."""
        return self.weights.tensors[name].dim() == 1
