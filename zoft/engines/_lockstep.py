"""Several forwards side by side: each runs until the others are where it is, and what they share is done once.

The forwards are coroutines of one thread (greenlets), so nothing runs at the same time and any Python code may take
part: an objective is called as often as without it and need not know. A forward calls :meth:`Lockstep.sync` where the
work is the same for all of them; it is suspended there until every other one has arrived, or has arrived elsewhere.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zoft.utils.lazy import torch
from zoft.utils.meeting import MEET

_SEQUENTIAL = contextvars.ContextVar("_SEQUENTIAL", default=False)


@contextmanager
def sequential(*, on: bool = True) -> Iterator[None]:
    """Within this block a forward does not wait for the others: for code that must not be left halfway."""
    token = _SEQUENTIAL.set(on)
    try:
        yield
    finally:
        _SEQUENTIAL.reset(token)


def together() -> AbstractContextManager[None]:
    """Within this block a forward waits for the others again, inside :func:`sequential` too."""
    return sequential(on=False)


def is_sequential() -> bool:
    """Whether this is inside :func:`sequential`."""
    return _SEQUENTIAL.get()


BatchFn = Callable[[list[Any]], Sequence[Any]]
"""The items of all that have come -> what each one gets."""


@dataclass(frozen=True)
class Barrier:
    """A key that no forward passes before all have come to a barrier: the work there ends what was before it.

    Args:
        key: which.
    """

    key: Hashable


@dataclass
class _Arrival:
    key: Hashable
    item: Any
    batch_fn: BatchFn
    state: tuple[Any, ...]


class Lockstep:
    """Runs calls side by side.

    Example:
        >>> lockstep = Lockstep()
        >>> def forward(x):
        ...     return lockstep.sync("layer", x, lambda xs: [sum(xs)] * len(xs)) + x
        >>> lockstep.run([lambda: forward(1), lambda: forward(10)])
        [12, 21]
        >>> forward(1)  # alone, outside a run
        2
    """

    def __init__(self) -> None:
        self.is_running = False
        self._scheduler: Any = None
        self._ambient: tuple[Any, ...] = ()

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of all ``calls``, in order.

        When one raises, the others are ended where they are (their ``finally`` blocks run) and the error goes on.
        """
        import greenlet

        if len(calls) == 1 or self.is_running:
            return [call() for call in calls]
        runners = [greenlet.greenlet(call) for call in calls]
        # each forward has context variables of its own, as a thread would
        for runner in runners:
            runner.gr_context = contextvars.copy_context()
            runner.gr_context.run(MEET.set, self.sync)
        # what the caller has set, autocast and gradient mode, is what the scheduler itself runs in
        self._scheduler, self._ambient, self.is_running = greenlet.getcurrent(), _thread_state(), True
        try:
            return self._schedule(runners)
        finally:
            for runner in runners:
                while runner:  # alive: something was raised
                    runner.throw()
            self.is_running = False
            _set_thread_state(self._ambient)

    def _schedule(self, runners: list[Any]) -> list[Any]:
        results: dict[Any, Any] = {}
        waiting: dict[Any, _Arrival] = {}
        num_syncs = dict.fromkeys(runners, 0)

        def resume(runner: Any, *answer: Any) -> None:
            got = runner.switch(*answer)
            if runner.dead:
                results[runner] = got
            else:
                # every forward runs up to its first sync, or to its end
                waiting[runner] = got

        for runner in runners:
            resume(runner)
        while waiting:
            # Where they have parted (experts of a mixture), few wait for many, and who has come less far goes first.
            num_at = Counter(arrival.key for arrival in waiting.values())
            keys = {runner: arrival.key for runner, arrival in waiting.items()}
            first = min(waiting, key=lambda r: (isinstance(keys[r], Barrier), num_at[keys[r]], num_syncs[r]))
            # those that wait at the same place, in the order of the calls
            key = keys[first]
            group = [runner for runner in runners if keys.get(runner, self) == key]
            arrivals = [waiting.pop(runner) for runner in group]
            # the work is done once, under the autocast of those that wait for it
            _set_thread_state(arrivals[0].state)
            answers = arrivals[0].batch_fn([arrival.item for arrival in arrivals])
            # each goes on with its share, until its next sync or its end
            _set_thread_state(self._ambient)
            for runner, answer in zip(group, answers, strict=True):
                num_syncs[runner] += 1
                resume(runner, answer)
        return [results[runner] for runner in runners]

    def sync(self, key: Hashable, item: Any, batch_fn: BatchFn) -> Any:
        """Do the work once for all forwards that come to ``key``.

        Outside :meth:`run`, and inside a context that cannot be interleaved, it is done for this one alone.

        Args:
            key: names the place in the forward.
            item: what this forward gives to the work.
            batch_fn: the items of all that have come -> what each of them gets.

        Returns:
            This forward's share.
        """
        # under torch.device(...) and the like a switch would close one forward's context in another
        if not self.is_running or _SEQUENTIAL.get() or _modes() != self._ambient[0]:
            return batch_fn([item])[0]
        state = _thread_state()
        # the scheduler and the other forwards must not see what this one has set
        _set_thread_state(self._ambient)
        answer = self._scheduler.switch(_Arrival(key, item, batch_fn, state))
        _set_thread_state(state)
        return answer


def _modes() -> int:
    """How many overriding contexts (``with torch.device(...)``, ...) are open: they must close in order."""
    return int(torch._C._len_torch_function_stack()) + int(torch._C._len_torch_dispatch_stack())


def _thread_state() -> tuple[Any, ...]:
    """What a forward sets for a while and would leave to the next one: autocast and gradient mode."""
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices()]
    return _modes(), torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), autocast


@lru_cache(maxsize=1)
def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _set_thread_state(state: tuple[Any, ...]) -> None:
    _, grad, cache, autocast = state
    torch.set_grad_enabled(grad)
    torch.set_autocast_cache_enabled(cache)
    for device, enabled, dtype in autocast:
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
