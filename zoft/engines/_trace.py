"""Sessions whose queries change the weights in the last bits: MeZO's +eps, -2 eps, +eps does not return exactly."""

from __future__ import annotations

from collections.abc import Sequence

from zoft.estimators.base import Point


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
