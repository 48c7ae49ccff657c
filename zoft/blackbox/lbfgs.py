"""L-BFGS: the curvature, from differences of the last steps' gradients, gives a Newton-like direction."""

from __future__ import annotations

from collections import deque

from zoft.utils.lazy import Tensor


class LBFGSMemory:
    """Pairs (s, y) of how x and its gradient have moved, and the direction -H g that they make of a gradient.

    Args:
        memory: how many pairs are kept.

    Example:
        >>> import torch
        >>> bends = LBFGSMemory(2)
        >>> for s in torch.eye(2):
        ...     bends.add(s, torch.tensor([1.0, 100.0]) * s)
        >>> bends.direction(torch.tensor([1.0, 100.0]), torch.tensor([True, True]))  # of x^2 / 2 + 50 y^2 at (1, 1)
        tensor([-1., -1.])

    References: Nocedal 1980; Liu & Nocedal 1989, Algorithm 2.1.
    """

    def __init__(self, memory: int) -> None:
        self.pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=memory)

    def add(self, s: Tensor, y: Tensor) -> None:
        """Add a step s and the change y of the gradient along it; a pair without positive curvature is left out."""
        if float(s @ y) > 1e-10 * float(s.norm()) * float(y.norm()):
            self.pairs.append((s, y))

    def direction(self, gradient: Tensor, free: Tensor) -> Tensor | None:
        """-H g among the elements that are free to move; None before there is a pair.

        Args:
            gradient: g [d].
            free: bool [d].
        """
        pairs = [(s * free, y * free) for s, y in self.pairs]
        pairs = [(s, y) for s, y in pairs if float(s @ y) > 0]
        if not pairs:
            return None
        direction, shares = -gradient * free, []
        for s, y in reversed(pairs):
            shares.append(float(s @ direction) / float(s @ y))
            direction = direction - shares[-1] * y
        s, y = pairs[-1]
        direction = direction * (float(s @ y) / float(y @ y))
        for (s, y), share in zip(pairs, reversed(shares), strict=True):
            direction = direction + (share - float(y @ direction) / float(s @ y)) * s
        return direction
