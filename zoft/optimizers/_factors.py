"""A tensor's gradient as factors: the gradients e of a layer's outputs and its inputs x, position by position."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zoft.utils.lazy import Tensor


@dataclass(frozen=True)
class Factors:
    """sum_p e_p x_p^T without the matrix: N positions, all float32.

    Args:
        e: [N, m], each weighted with its share of the loss.
        x: [N, n]; for layout=vector [N, m].
        layout: matrix (the tensor is [m, n]), turned ([n, m]), or vector ([m]: sum_p e_p * x_p).
    """

    e: Tensor
    x: Tensor
    layout: str = "matrix"

    def dense(self) -> Tensor:
        """The gradient in the tensor's shape."""
        if self.layout == "vector":
            return (self.e * self.x).sum(0)
        return self.x.T @ self.e if self.layout == "turned" else self.e.T @ self.x

    def inner(self, other: Factors) -> float:
        """<this, other> over the tensor's elements, in float64 at the end."""
        if self.layout == "vector":
            return float((self.dense().double() * other.dense().double()).sum())
        return float(((self.e @ other.e.T).double() * (self.x @ other.x.T).double()).sum())

    def scaled(self, factor: float) -> Factors:
        """``factor`` times this."""
        return replace(self, e=self.e * factor)
