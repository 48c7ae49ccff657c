"""The true gradient of a step's loss in the trained weights: one backward pass a micro-batch, summed in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoft.engines._backward import loss_with_graph
from zoft.engines.base import Session, memory_errors_say

Gradient = dict[str, Tensor]
"""Tensor name -> its gradient, float32, flat; a tensor that the loss does not depend on is not there."""

_PIECE = 1 << 22  # elements that are widened to float64 at a time


def gradient_of(session: Session, parts: Iterable[tuple[Any, float]]) -> Gradient:
    """sum_i w_i grad L(batch_i), with a graph of one batch at a time.

    Args:
        session: whose objective is differentiated, at the weights as they are; they and their ``.grad`` stay.
        parts: (batch, w), a micro-batch each.

    Returns:
        4 bytes for every trained weight.

    Raises:
        UserError: the objective has no gradient; or memory is wanting (then an ``OutOfMemoryError``).

    Example:
        >>> from zoft.subspaces.full import Full
        >>> from zoft.weights.tensors import Weights
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> bound = Session(layer, Full().bind(Weights(layer)), lambda x: layer(x).sum())
        >>> gradient_of(bound, [(torch.tensor([[1.0, 2.0]]), 0.5)])
        {'weight': tensor([0.5000, 1.0000])}
    """
    total: Gradient = {}

    def add(weight: float) -> Callable[[str, Tensor], None]:
        def take(name: str, gradient: Tensor) -> None:
            flat = gradient.reshape(-1)
            if name in total:
                total[name].add_(flat.to(torch.float32), alpha=weight)
            else:
                total[name] = flat.to(torch.float32, copy=True).mul_(weight)

        return take

    with memory_errors_say("leave the true gradient out: diagnostics.gradient=false"):
        for batch, weight in parts:
            _, run = loss_with_graph(session, batch)
            run(add(weight))
    return total


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b> of two flat tensors, in float64."""
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return float(sum(torch.dot(x.double(), y.double()) for x, y in pieces))
