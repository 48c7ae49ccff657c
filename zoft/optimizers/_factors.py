"""A tensor's gradient as factors: the gradients e of a layer's outputs and its inputs x, position by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from zoft.utils.lazy import Tensor, torch


@dataclass(frozen=True)
class Factors:
    """sum_p e_p x_p^T without the matrix: N positions, all float32.

    Args:
        e: [N, m], each weighted with its share of the loss.
        x: [N, n]; for layout=vector [N, m].
        layout: matrix (the tensor is [m, n]), turned ([n, m]), vector ([m]: sum_p e_p * x_p), or experts ([E, m, n]: of
            expert j the sum over its own rows).
        noisy: whether e is from probes, most of whose square is noise.
        expert: [N] int64, which expert each row is of.
        num_experts: E.
    """

    e: Tensor
    x: Tensor
    layout: str = "matrix"
    noisy: bool = True
    expert: Tensor | None = None
    num_experts: int = 0

    def dense(self) -> Tensor:
        """The gradient in the tensor's shape."""
        if self.layout == "vector":
            # vector: sum_p e_p x_p, element by element; matrix: sum_p e_p x_p^T = E^T X
            return (self.e * self.x).sum(0)
        if self.expert is not None:
            dense = self.e.new_zeros(self.num_experts, self.e.shape[1], self.x.shape[1])
            for number in self.expert.unique().tolist():
                rows = self.expert == number
                dense[number] = self.e[rows].T @ self.x[rows]
            return dense
        return self.x.T @ self.e if self.layout == "turned" else self.e.T @ self.x

    def inner(self, other: Factors) -> float:
        """<this, other> over the tensor's elements, in float64 at the end."""
        if self.layout == "vector":
            return float((self.dense().double() * other.dense().double()).sum())
        # <E^T X, F^T Y> = sum_pq (e_p . f_q)(x_p . y_q): N x N numbers, the matrices are never made
        products = (self.e @ other.e.T).double() * (self.x @ other.x.T).double()
        if self.expert is not None and other.expert is not None:
            products = products * (self.expert.unsqueeze(1) == other.expert)  # two experts are two matrices
        return float(products.sum())

    def square(self) -> float:
        """Sum of the squares of the gradient's elements."""
        by_rows = self.expert is not None or len(self.x) < min(self.e.shape[1], self.x.shape[1])  # N x N are fewer
        return max(0.0, self.inner(self)) if by_rows else float(self.dense().double().square().sum())

    def to(self, device: torch.device) -> Factors:
        """These factors on a device."""
        expert = None if self.expert is None else self.expert.to(device)
        return replace(self, e=self.e.to(device), x=self.x.to(device), expert=expert)

    def scaled(self, factor: float) -> Factors:
        """``factor`` times this."""
        # E alone is scaled: the product takes one factor once
        return replace(self, e=self.e * factor)


def to_state(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """The factors as tensors and plain values; inputs that several tensors share are kept once.

    Example:
        >>> one = Factors(torch.ones(2, 3), torch.zeros(2, 4))
        >>> state = to_state({"gate": one, "up": one})
        >>> len(state["x"]), of_state(state, "cpu")["up"].dense().shape
        (1, torch.Size([3, 4]))
    """
    inputs: list[Tensor] = []
    tensors = {}
    for name, factor in factors.items():
        # gate and up of a block have the same inputs, the largest part of what is written
        same_inputs = (
            number for number, x in enumerate(inputs) if x.shape == factor.x.shape and torch.equal(x, factor.x)
        )
        number = next(same_inputs, len(inputs))
        if number == len(inputs):
            inputs.append(factor.x)
        expert = [] if factor.expert is None else [factor.expert, factor.num_experts]
        tensors[name] = [factor.e, number, factor.layout, factor.noisy, *expert]
    return {"x": inputs, "tensors": tensors}


def of_state(state: Mapping[str, Any], device: torch.device | str) -> dict[str, Factors]:
    """The factors that :func:`to_state` made this state of, on a device."""
    inputs = [x.to(device) for x in state["x"]]
    return {
        name: Factors(e, inputs[number], *more).to(torch.device(device))
        for name, (e, number, *more) in state["tensors"].items()
    }
