"""Calls of f: one point at a time, many at once, or in parallel workers; what fails is a failure, not the end."""

from __future__ import annotations

import concurrent.futures as futures
import math
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zoft.errors import UserError

PARALLEL = ("threads", "processes")
"""Where workers run."""

Value = float | BaseException
"""What a query gave: a finite number, or what went wrong."""


class NotFiniteError(ArithmeticError):
    """f returned NaN or an infinity."""


class NotANumberError(TypeError):
    """f returned something that is not one number."""


def number(value: Any) -> Value:
    """What f returned as a finite float, or what is wrong with it.

    Args:
        value: a number, or an array or tensor of one element; an exception is handed back as it is.

    Example:
        >>> number(np.float32(0.5)), number(float("nan")), number([1.0, 2.0])
        (0.5, NotFiniteError('nan'), NotANumberError('an array of shape (2,)'))
    """
    if isinstance(value, BaseException):
        return value
    try:
        array = np.asarray(value.tolist() if hasattr(value, "detach") else value)  # numpy has no bfloat16
        if array.size != 1:
            return NotANumberError(f"an array of shape {array.shape}")
        result = float(array.item())
    except OverflowError:
        return NotFiniteError("an integer beyond float64")
    except (TypeError, ValueError):
        return NotANumberError(f"{value!r}"[:80])
    return result if math.isfinite(result) else NotFiniteError(str(result))


class Calls:
    """Values of f at points, in the points' order, by whichever worker they were computed.

    Args:
        f: the function, of one point (or of stacked points).
        stack: points -> all of them as one, for a vectorised f; None for one point at a time.
        workers: how many points are evaluated at the same time.
        parallel: ``threads``, for functions that wait or leave Python; ``processes``, for those that compute in it.

    Raises:
        UserError: settings that make no sense together, and an f that cannot be sent to other processes.

    Example:
        >>> with Calls(lambda x: 1 / x, workers=2) as calls:
        ...     print(calls([0.5, 0.0]))
        [2.0, ZeroDivisionError('float division by zero')]
    """

    def __init__(
        self,
        f: Callable[[Any], Any],
        stack: Callable[[Sequence[Any]], Any] | None = None,
        workers: int = 1,
        parallel: str = "threads",
    ) -> None:
        if not callable(f):
            raise UserError(f"f must be a function of x, got {type(f).__name__}")
        if parallel not in PARALLEL:
            raise UserError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
        if not isinstance(workers, int) or workers < 1:
            raise UserError(f"workers must be a whole number >= 1, got {workers!r}")
        if stack is not None and workers > 1:
            raise UserError("vectorized=True hands all points to f at once, which leaves nothing for workers: drop one")
        self.f, self.stack = f, stack
        self.pool = _pool(f, workers, parallel) if workers > 1 else None

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, points: Sequence[Any]) -> list[Value]:
        """A finite number or what went wrong, for each point."""
        if self.stack is not None:
            return self._at_once(points)
        if self.pool is None:
            return [_value(self.f, point) for point in points]
        send = _value_in_worker if isinstance(self.pool, futures.ProcessPoolExecutor) else _value
        first = (None if send is _value_in_worker else self.f for _ in points)
        try:
            return list(self.pool.map(send, first, points))
        except futures.BrokenExecutor as error:
            raise UserError(
                "a worker process died while it evaluated f (out of memory, or a script without an "
                "`if __name__ == '__main__':` guard, which other processes need to import it)"
            ) from error

    def _at_once(self, points: Sequence[Any]) -> list[Value]:
        assert self.stack is not None
        try:
            values = self.f(self.stack(points))
            values = np.asarray(values.tolist() if hasattr(values, "detach") else values)
        except Exception as error:
            return [error] * len(points)
        if values.shape not in ((len(points),), (len(points), 1)):
            raise UserError(
                f"with vectorized=True f gets n points and must return n numbers: of {len(points)} points it returned "
                f"an array of shape {values.shape}"
            )
        return [number(value) for value in values.reshape(-1)]


def _value(f: Callable[[Any], Any], point: Any) -> Value:
    try:
        return number(f(point))
    except Exception as error:
        return error


_function: Callable[[Any], Any] | None = None  # in a worker process: f


def _value_in_worker(_: None, point: Any) -> Value:
    assert _function is not None
    value = _value(_function, point)
    if isinstance(value, BaseException):
        try:
            pickle.loads(pickle.dumps(value))
        except Exception:  # an exception with arguments of its own does not travel
            return RuntimeError(f"{type(value).__name__}: {value}")
    return value


def _take_place(f: bytes) -> None:
    global _function
    _function = pickle.loads(f)


def _pool(f: Callable[[Any], Any], workers: int, parallel: str) -> futures.Executor:
    if parallel == "threads":
        return futures.ThreadPoolExecutor(workers)
    try:
        sent = pickle.dumps(f)
    except Exception as error:
        raise UserError(
            f"f cannot be sent to other processes ({error}): define it at the top of a module, or use parallel=threads"
        ) from None
    # "spawn": a forked copy of a process in which torch has threads may hang
    context = multiprocessing.get_context("spawn")
    return futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_take_place, initargs=(sent,))
