"""Calls that run side by side hand in their items, and the work (judging texts) is done once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any

MEET: ContextVar[Callable[..., Any]] = ContextVar("MEET", default=lambda _, item, batch_fn: batch_fn([item])[0])
"""Set by what runs calls side by side: as :func:`met`; a call by itself is alone."""


def met(key: Hashable, item: Any, batch_fn: Callable[[list[Any]], Sequence[Any]]) -> Any:
    """This call's share of what ``batch_fn`` does with the items of all calls that come to ``key``."""
    return MEET.get()(key, item, batch_fn)
