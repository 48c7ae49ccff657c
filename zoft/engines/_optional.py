"""Optional interfaces of sessions: queries that leave a trace in the weights, weights that leave the device.

A query of MeZO's (+eps, -2 eps, +eps) does not return exactly; weights that are away have a place and a time to be
written at, which :func:`device_of` and :func:`settle` say for sessions of every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zoft.estimators.base import Point
from zoft.utils.lazy import torch
from zoft.weights.tensors import Weights


class LeavesTrace:
    """A session that brings the weights back by arithmetic, each addition rounded."""

    def pass_over(self, points: Sequence[Point]) -> None:
        """Leave in the weights what queries at these points leave.

        Args:
            points: of a step that is taken from a journal.
        """
        raise NotImplementedError

    def take_path(self) -> list[Point]:
        """The points that queries have left a trace of since the last call."""
        raise NotImplementedError


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
    """Where a tensor is while it is perturbed, and where what belongs to it is made."""
    if isinstance(session, KeepsWeightsAway):
        return session.device(name)
    return session.weights.tensors[name].device
