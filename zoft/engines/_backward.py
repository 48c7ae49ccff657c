"""The clean loss and its gradient by backpropagation, tensor by tensor, the same under every engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from zoft.engines.base import Session
from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch

Backward = Callable[[Callable[[str, "Tensor"], None]], None]
"""Runs a backward pass and hands over (tensor name, gradient), one by one."""


def loss_with_graph(session: Session, batch: Any, names: frozenset[str] | None = None) -> tuple[Tensor, Backward]:
    """The loss with its graph, and the backward pass to be run later.

    Args:
        session: at the weights where the gradient is wanted.
        batch: handed to the objective as it is.
        names: tensors whose gradient is wanted; all trained ones if left out. No graph is kept below them.

    Returns:
        The clean loss, float32 scalar on the CPU; and a function that runs the backward pass, and hands over name
        and gradient of each tensor as soon as it is there: what it is handed to may write the tensor.

    Raises:
        UserError: the objective has no gradient.
    """
    # autograd keeps no activations of layers below the lowest tensor that wants a gradient
    parameters = {n: t for n, t in session.weights.tensors.items() if names is None or n in names}
    frozen = [t for n, t in session.weights.tensors.items() if n not in parameters]
    try:
        for tensor in frozen:
            tensor.requires_grad_(False)
        with torch.enable_grad():
            loss = session.objective(batch)
    finally:
        for tensor in frozen:
            tensor.requires_grad_(True)
    if not loss.requires_grad:
        raise UserError(
            "the objective has no gradient along the trained weights: a backward pass needs a differentiable "
            "objective; use estimator=central"
        )
    return loss.detach().to("cpu", torch.float32), partial(_run_backward, loss, parameters)


def _run_backward(loss: Tensor, wanted: dict[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> None:
    """Pass each gradient to ``take`` as autograd makes it, and free it; afterwards restore the earlier ``.grad``."""

    def hand_over(name: str, parameter: Tensor) -> None:
        # autograd drops its reference too: no more than a few gradients exist at a time
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        take(name, gradient.detach())

    # a user's own .grad is none of ours: it is there again afterwards
    before = {name: tensor.grad for name, tensor in wanted.items()}
    handles = [tensor.register_post_accumulate_grad_hook(partial(hand_over, name)) for name, tensor in wanted.items()]
    try:
        for tensor in wanted.values():
            tensor.grad = None
        # the hooks run while the backward pass goes on, from the head down
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        for name, tensor in wanted.items():
            tensor.grad = before[name]
