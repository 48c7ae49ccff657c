"""The interface between a search and the code that runs it: values at points, the budget, a note of the best point."""

from __future__ import annotations

from typing import Any, Protocol

from zoft.blackbox.result import Result


class Host(Protocol):
    """Runs a search: :class:`zoft.blackbox.minimizer.Minimizer` is one."""

    budget: int

    @property
    def left(self) -> int:
        """Queries of the budget that are left."""

    def values(self, points: list[Any]) -> list[float]:
        """f at points, NaN where it failed; no more of them than are left."""

    def nearest(self, x: Any) -> tuple[Any, float]:
        """The point nearest to x among the last points at which f did not fail, and f there."""

    def result(self) -> Result:
        """Where the search stands."""

    def note(self, **fields: Any) -> None:
        """Set fields of the :class:`zoft.blackbox.result.Result`."""

    def note_step(self, x: Any, loss: float, learning_rate: float, eps: float, length: float) -> None:
        """A step has been taken to ``x``, or skipped (``loss`` is NaN)."""
