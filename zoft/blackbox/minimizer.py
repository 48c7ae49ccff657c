"""A search by ask and tell: it names the points it needs, the caller evaluates f there and hands the values back."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from greenlet import greenlet

from zoft.blackbox.calls import Value, number
from zoft.blackbox.ending import Stop, kept_for_the_end, measure
from zoft.blackbox.result import Failure, Result, StepRecord
from zoft.blackbox.search import search
from zoft.blackbox.settings import MinimizeSettings
from zoft.blackbox.space import Space
from zoft.errors import UserError

_KEEP_FAILURES = 20
_KEEP_VALUES = 64
_CHANCES = 3  # points of a noisy f that may fail twice, beside those that failed the first time only

Callback = Callable[[Result], Any]
"""Called after every step with where the search stands; it stops the search by returning True."""


class Minimizer:
    """A search by ask and tell, for functions that are evaluated elsewhere.

    A search is a function of its arguments and of the values it is given: given the same values again, it asks for
    the same points again, which is how one is resumed from a log. Call ask and tell from one thread.

    Args:
        x0: see :func:`zoft.minimize`, as for all that follows.
        budget: how many points it may ask for.
        settings: the other arguments of :func:`zoft.minimize` that are about the search and not about calling f.

    Raises:
        UserError: arguments that make no sense, before anything is asked.

    Example:
        >>> search = Minimizer([3.0, -1.0], budget=200)
        >>> while not search.done:
        ...     points = search.ask()
        ...     search.tell([float((x**2).sum()) for x in points])
        >>> result = search.result()
        >>> result.num_queries <= 200, result.fun < 1e-6
        (True, True)
    """

    def __init__(self, x0: Any, *, budget: int = 1000, callback: Callback | None = None, **settings: Any) -> None:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise UserError(f"budget must be a whole number of queries >= 1, got {budget!r}")
        self.budget, self.callback = budget, callback
        bounds = {name: settings.pop(name) for name in ("bounds", "bounds_by", "scale") if name in settings}
        self.settings = MinimizeSettings.of(budget=budget, **settings)
        self.space = Space(x0, **bounds)
        if not self.settings.fixes_eps:  # what is given is in units of x
            self.space.scale_by_bounds()
        self._result = Result(x=self.space.x(self.space.start()), fun=math.inf)
        self.best, self._best_x = math.inf, self._result.x  # the lowest value seen, and where
        self._finite: deque[tuple[Any, float]] = deque(maxlen=_KEEP_VALUES)  # the last points that did not fail
        self._doubted = math.inf  # the lowest value that reached the target by luck
        self._chances = _CHANCES
        self._wanted: list[Any] = []
        self.settings.method(self.space)  # what cannot work is refused here
        self._greenlet = greenlet(self._search)
        self._caller: greenlet | None = None
        self._started = self._ended = False

    # ---- for who evaluates f -----------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether nothing more is to be asked."""
        if not self._started and not self._ended:
            self._started = True
            self._switch()
        return self._ended

    def ask(self) -> list[Any]:
        """The points at which f is to be evaluated, of the form of x0; the same ones until :meth:`tell`.

        Raises:
            UserError: the search is done.
        """
        if self.done:
            raise UserError(f"the search is done ({self._result.message}): look at result()")
        return copy.deepcopy(self._wanted)  # f may write into what it is given

    def tell(self, values: Sequence[Any]) -> None:
        """What f is at the points of :meth:`ask`.

        Args:
            values: a number for each, in their order; an exception, NaN or an infinity where it failed.

        Raises:
            UserError: another number of values than points, nothing was asked, or f failed at x0.
        """
        if not self._wanted:
            raise UserError("tell() answers ask(): there is no question open")
        results = [number(value) for value in values]
        if len(results) != len(self._wanted):
            raise UserError(f"tell() needs {len(self._wanted)} values, one for each point of ask(), got {len(results)}")
        points, self._wanted = self._wanted, []
        self._note(points, results)
        self._switch([value if isinstance(value, float) else math.nan for value in results])

    def result(self) -> Result:
        """Where the search stands, or how it ended."""
        return self._result

    def stop(self, status: str, message: str, *, success: bool = True) -> Result:
        """End the search here, and keep what it has found."""
        self._wanted = []
        self._finish(status, message, success)
        if self._greenlet:  # begun and not dead
            self._greenlet.parent = greenlet.getcurrent()
            self._greenlet.throw()
        self._ended = True
        return self._result

    # ---- for the search ----------------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Queries that are left."""
        return self.budget - self._result.num_queries - len(self._wanted)

    def values(self, points: list[Any]) -> list[float]:
        """f at points, NaN where it failed: the search waits here until :meth:`tell` brings them."""
        values = self._once_more(points, self._told(points))
        target = self.settings.target
        if target is not None and self.best <= target and self.best < self._doubted:
            fun = self._again(self._best_x) if self._result.noisy else self.best
            if fun <= target:
                self.note(x=self._best_x, fun=fun)
                raise Stop("target", f"A value of {fun:.6g} reached target={target:g}.")
            self._doubted = self.best
        return values

    def _once_more(self, points: list[Any], values: list[float]) -> list[float]:
        """A noisy f may fail by chance, too: ask again where it did, as long as that is of use."""
        failed = [place for place, value in enumerate(values) if not math.isfinite(value)]
        affordable = self.left - len(failed) >= kept_for_the_end(self)
        if not failed or not self._result.noisy or self._chances <= 0 or not affordable:
            return values
        again = self._told([points[place] for place in failed])
        self._chances += sum(1 if math.isfinite(value) else -1 for value in again)
        second_values = dict(zip(failed, again, strict=True))
        return [second_values.get(place, value) for place, value in enumerate(values)]

    def nearest(self, x: Any) -> tuple[Any, float]:
        """The point nearest to x among the last points at which f did not fail, and f there."""
        here = _flat(x)
        return min(self._finite, key=lambda pair: float(((_flat(pair[0]) - here) ** 2).sum()))

    def _told(self, points: list[Any]) -> list[float]:
        assert len(points) <= self.left, "a step asks for no more than the budget has"
        self._wanted = points
        assert self._caller is not None
        values: list[float] = self._caller.switch()
        return values

    def _again(self, x: Any) -> float:
        """The mean of more calls of a noisy f: the lowest value seen is a lucky one."""
        calls = min(kept_for_the_end(self), self.left - kept_for_the_end(self))
        values = [value for value in self._told([x] * calls) if math.isfinite(value)] if calls > 0 else []
        return math.fsum(values) / len(values) if values else math.inf

    def note_step(self, x: Any, loss: float, learning_rate: float, eps: float, length: float) -> None:
        """A step has been taken, or skipped."""
        result = self._result
        if result.noisy and math.isfinite(loss):
            result.x, result.fun = x, loss
        result.history.append(
            StepRecord(result.num_steps, result.num_queries, loss, self.best, learning_rate, eps, length)
        )
        result.num_steps += 1
        if self.callback is None:
            return
        try:
            stops = self.callback(result)
        except StopIteration:  # SciPy's way
            stops = True
        if stops:
            raise Stop("callback", "The callback stopped the search.")

    def note(self, **fields: Any) -> None:
        """What else the search has found out: fields of its :class:`Result`."""
        self._result = replace(self._result, **fields)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _switch(self, *values: list[float]) -> None:
        """Go on with the search until it wants to know more, or ends."""
        self._caller = self._greenlet.parent = greenlet.getcurrent()
        self._greenlet.switch(*values)

    def _search(self) -> None:
        try:
            search(self.settings, self.space, self)
            raise AssertionError("a search says why it ends")
        except Stop as stop:
            if self._result.noisy and stop.status == "failed" and self.left:
                measure(self._result.x, self)
            self._finish(stop.status, stop.message, stop.success)
        finally:
            self._ended = True

    def _finish(self, status: str, message: str, success: bool) -> None:
        if status in ("interrupted", "callback") and self._result.noisy and self._finite:
            x, fun = self.nearest(self._result.x)  # nothing more is asked: a point whose value is known
            self.note(x=x, fun=fun)
        result = self._result
        if result.num_failed:
            message += f" {result.num_failed} of {result.num_queries} queries failed; the first: {result.failures[0]}."
        result.status, result.message, result.success = status, message, success

    def _note(self, points: list[Any], values: list[Value]) -> None:
        """Count, keep the best, and keep what failed."""
        result, is_first = self._result, not self._result.num_queries
        for point, value in zip(points, values, strict=True):
            if isinstance(value, float):
                self._finite.append((point, value))
                if value < self.best:
                    self.best, self._best_x = value, point
                    if not result.noisy:
                        result.fun, result.x = value, point
            else:
                result.num_failed += 1
                if len(result.failures) < _KEEP_FAILURES:
                    result.failures.append(Failure(result.num_queries, point, value))
            result.num_queries += 1
        if is_first and result.num_failed == len(points):
            error = result.failures[0].error
            self.stop("failed", "f failed at x0.", success=False)
            raise UserError(f"f must return one finite number at x0, and did not: {result.failures[0]}") from error


def _flat(x: Any) -> np.ndarray:
    """The elements of a point, whatever its form."""
    arrays = x.values() if isinstance(x, dict) else [x]
    return np.concatenate([np.asarray(a.detach().cpu() if hasattr(a, "detach") else a, float).ravel() for a in arrays])
