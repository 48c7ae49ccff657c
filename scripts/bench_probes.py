"""Where the time of a step goes, and how much memory it takes on the CPU."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import greenlet
import torch

from zoft.engines._lockstep import Lockstep
from zoft.engines.base import Session
from zoft.report.memory import PeakMemory

PARTS = ("forward", "head", "noise", "other")


class Clock:
    """Wall time by part, each moment counted once: what is entered later stops the clock of what is around it.

    Forwards may run side by side as coroutines (greenlets), so each has a stack of parts of its own.
    """

    def __init__(self, device: str) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._parts: dict[Any, list[str]] = defaultdict(lambda: ["other"])
        self._thread = threading.get_ident()
        self._wait()
        self._last = time.perf_counter()

    def tick(self, coroutine: Any = None) -> None:
        """Give the time since the last tick to what ran, in the coroutine that ran (this one when left out)."""
        self._wait()
        now = time.perf_counter()
        self.seconds[self._parts[greenlet.getcurrent() if coroutine is None else coroutine][-1]] += now - self._last
        self._last = now

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` on this part's account."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:  # what runs beside this thread costs it nothing
                return call(*args, **kwargs)
            parts = self._parts[greenlet.getcurrent()]
            self.tick()
            parts.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.tick()
                parts.pop()

        return inner

    def head(self, *_: Any) -> None:
        """The language-model head begins: the rest of this evaluation of the objective is on its account."""
        self.tick()
        self._parts[greenlet.getcurrent()][-1] = "head"

    def syncing(self, sync: Callable[..., Any]) -> Callable[..., Any]:
        """``Lockstep.sync``, where work that is done once for several forwards stays on the account they were on."""

        def inner(lockstep: Any, key: Any, item: Any, batch_fn: Callable[..., Any]) -> Any:
            part = self._parts[greenlet.getcurrent()][-1]
            return sync(lockstep, key, item, self.timed(part, batch_fn))

        return inner

    def shares(self) -> dict[str, float]:
        """Part -> its share of all time so far."""
        self.tick()
        return {part: seconds / sum(self.seconds.values()) for part, seconds in self.seconds.items()}


@contextmanager
def clock_in(model: Any, device: str, objective: tuple[Any, str], noise: list[tuple[Any, str]]) -> Iterator[Clock]:
    """Within this block the objective, the head, and everything that makes or adds noise are on the clock."""
    clock = Clock(device)
    with ExitStack() as stack:
        for part, (host, name) in [("forward", objective), *(("noise", place) for place in noise)]:
            stack.enter_context(mock.patch.object(host, name, clock.timed(part, getattr(host, name))))
        stack.enter_context(mock.patch.object(Lockstep, "sync", clock.syncing(Lockstep.sync)))
        stack.callback(model.get_output_embeddings().register_forward_pre_hook(clock.head).remove)
        stack.callback(greenlet.settrace, greenlet.settrace(lambda _, coroutines: clock.tick(coroutines[0])))
        yield clock


def noise_of(session: Session) -> list[tuple[Any, str]]:
    """Every public method of the coordinates and of their source, and the engines' ``perturbed``: (where, name)."""
    hosts = [session.coordinates, session.coordinates.source]
    places = [(host, name) for host in hosts for name in dir(host) if not name.startswith("_")]
    places += [(m, "perturbed") for name, m in list(sys.modules.items()) if name.startswith("zoft.engines.")]
    functions = (types.FunctionType, types.MethodType)
    return [(host, name) for host, name in places if isinstance(getattr(host, name, None), functions)]


def peak_mb_above_now(step: Callable[[], Any]) -> float:
    """Peak resident MiB of two calls above what is resident before them; nan where the peak cannot be reset."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    memory = PeakMemory()
    memory.reset()
    before = memory.current_mb()
    step()
    step()
    return memory.peak_mb() - before if memory.resettable else float("nan")


def in_processes_of_their_own(function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> list[Any]:
    """``function(*job)`` for each job, one after the other, each in a fresh process."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so the peak is what was in use
    context = multiprocessing.get_context("forkserver")  # forks of a process that has imported and run nothing
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("opt", "llama")]  # seconds, each time
    context.set_forkserver_preload(["__main__", "peft", *models])
    with context.Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(function, job) for job in jobs]
