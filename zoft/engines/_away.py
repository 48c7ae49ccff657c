"""Sessions whose weights leave the device between queries: where their tensors are, and when steps are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from zoft.weights.tensors import Weights

if TYPE_CHECKING:
    import torch


class HasWeights(Protocol):
    """A session of any engine."""

    weights: Weights


class KeepsWeightsAway:
    """Mixed into a session whose weights are on the device while they compute."""

    def write(self, name: str, step: Callable[[], None], *, can_wait: bool) -> None:
        """Carry out ``step``, which moves tensor ``name``: now, or up to :meth:`settle` where it ``can_wait``."""
        raise NotImplementedError

    def settle(self) -> None:
        """Write all steps that wait; the weights may be read and written from outside afterwards."""
        raise NotImplementedError

    def device(self, name: str) -> torch.device:
        """Where tensor ``name`` is while it is perturbed and while a step is written into it."""
        raise NotImplementedError


def settle(session: HasWeights | None) -> None:
    """Before weights are read or written from outside of the session: all steps have been written afterwards.

    Args:
        session: of the weights; None where there is none yet.
    """
    if isinstance(session, KeepsWeightsAway):
        session.settle()


def device_of(session: HasWeights, name: str) -> torch.device:
    """Where a tensor is while it is perturbed, and where what belongs to it is made.

    Args:
        session: has the tensor.
        name: of the tensor.
    """
    if isinstance(session, KeepsWeightsAway):
        return session.device(name)
    return session.weights.tensors[name].device
