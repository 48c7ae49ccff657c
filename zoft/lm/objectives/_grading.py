"""Rewards judged in processes of their own: a text is one call, and a judge that hangs or dies costs its own text."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zoft.errors import UserError

log = logging.getLogger(__name__)

START = 120.0
"""Seconds that a process may take to import the function."""

MOST_IN_A_ROW = 32
"""Texts in a row without a number: it is the function that is broken then, and not the texts."""

Job = tuple[str, str, Any]
_SAID = 3  # failures that are warned of one by one


@dataclass(frozen=True)
class Ungraded:
    """A text that got no number.

    Args:
        prompt: what was answered.
        text: what was written.
        why: it hung, died or raised.
    """

    prompt: str
    text: str
    why: str


_ungraded: list[Ungraded] = []


def take_ungraded() -> list[Ungraded]:
    """The texts of this process that got no number since this was asked last, in their order."""
    ungraded = list(_ungraded)
    _ungraded.clear()
    return ungraded


class Judges:
    """Processes that each call one function for one text at a time (``python -m zoft.lm.objectives._judge``).

    Args:
        function: ``module:function`` or ``FILE.py:function``.
        workers: how many.
    """

    def __init__(self, function: str, workers: int) -> None:
        self.function, self.workers = function, workers
        self.num_in_a_row = 0  # texts without a number
        self.num_said = 0
        self._idle: list[_Judge] = []

    def grade(self, each: Sequence[Sequence[Job]], timeout: float, failed: float | None) -> list[list[float]]:
        """A number for each of (prompt, text, answer), in their order; all of them side by side.

        Args:
            each: lists of them; the answer has to be what JSON has.
            timeout: seconds that a text may take.
            failed: what a text counts that got no number; None ends the run there.

        Raises:
            UserError: a text got no number and ``failed`` is None, or too many in a row got none, or the processes do
                not start.
        """
        jobs = [job for one in each for job in one]
        grades = self._answers([_line(self.function, job) for job in jobs], timeout, stops=failed is None)
        values = []
        for (prompt, text, _), answer in zip(jobs, grades, strict=True):
            if isinstance(answer, float):
                self.num_in_a_row = 0
                values.append(answer)
                continue
            lost = Ungraded(prompt, text, answer)
            self._count(lost, failed)
            assert failed is not None
            values.append(float(failed))
        numbers = iter(values)
        return [[next(numbers) for _ in one] for one in each]

    def _count(self, lost: Ungraded, failed: float | None) -> None:
        self.num_in_a_row += 1
        said = (
            f"objective.function={self.function}: {lost.why}, for the text {_short(lost.text)} of {_short(lost.prompt)}"
        )
        if failed is None:
            raise UserError(
                f"{said}: raise objective.timeout, or set objective.failed=NUMBER, which such texts count then; with "
                "either the same command goes on from the last step"
            )
        if self.num_in_a_row >= MOST_IN_A_ROW:
            self.num_in_a_row = 0
            raise UserError(
                f"{said}; so it was with {MOST_IN_A_ROW} texts in a row: see what the function waits for or lacks, and "
                "the same command goes on from the last step"
            )
        _ungraded.append(lost)
        self.num_said += 1
        if self.num_said <= _SAID:
            more = "; others are counted, and not said one by one" if self.num_said == _SAID else ""
            log.warning("%s; it counts as %g%s", said, failed, more)

    def _answers(self, lines: list[bytes], timeout: float, *, stops: bool) -> list[float | str]:
        """A number, or why there is none, for each; with ``stops`` nothing is begun behind the first without one."""
        answers: list[float | str] = ["it was not asked"] * len(lines)
        waiting, busy = deque(range(len(lines))), dict[_Judge, int]()
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.workers:
                        judge = self._idle.pop() if self._idle else _Judge(self.function)
                        place = waiting.popleft()
                        judge.ask(lines[place], timeout)
                        busy[judge] = place
                        selector.register(judge.replies, selectors.EVENT_READ, judge)
                    next_end = min(judge.deadline for judge in busy)
                    ready = {key.data for key, _ in selector.select(max(0.0, next_end - time.monotonic()))}
                    for judge in list(busy):
                        answer = judge.answer(ready=judge in ready, timeout=timeout)
                        if answer is None:
                            continue
                        answers[busy.pop(judge)] = answer
                        selector.unregister(judge.replies)
                        if judge.is_well:
                            self._idle.append(judge)
                        else:
                            judge.end()
                        if stops and not isinstance(answer, float):
                            waiting.clear()
            finally:
                for judge in busy:  # interrupted: what they work on is of no use
                    judge.end()
        first = next((one for one in answers if isinstance(one, str) and one != "it was not asked"), None)
        return [first if stops and first and isinstance(one, str) else one for one in answers]

    def close(self) -> None:
        """End the processes."""
        while self._idle:
            self._idle.pop().end()


class _Judge:
    """One process, in a group of its own so that what it starts ends with it."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zoft.lm.objectives._judge", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asks, self.replies = self.process.stdin, self.process.stdout
        self.is_well, self.has_begun = True, False
        self._read = b""
        self.deadline = time.monotonic() + START

    def ask(self, line: bytes, timeout: float) -> None:
        if self.has_begun:
            self.deadline = time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # the reply says so
            self.asks.write(line)
            self.asks.flush()

    def answer(self, *, ready: bool, timeout: float) -> float | str | None:
        """The number, or why there is none; None while it is still at work."""
        if ready:
            some = os.read(self.replies.fileno(), 1 << 16)
            self._read += some
            if not some:
                return self._died()
        if not self.has_begun and b"\n" in self._read:  # the function is there: the time of the text begins
            self._read = self._read.partition(b"\n")[2]
            self.has_begun, self.deadline = True, time.monotonic() + timeout
        if self.has_begun and b"\n" in self._read:
            line, _, self._read = self._read.partition(b"\n")
            reply = json.loads(line)
            return float(reply["value"]) if "value" in reply else str(reply["error"])
        if time.monotonic() < self.deadline:
            return None
        self.is_well = False
        if self.has_begun:
            return f"no number within {timeout:g} s"
        self.end()
        raise UserError(f"objective.function={self.function}: a process did not import it within {START:g} s")

    def _died(self) -> str:
        self.is_well = False
        code = self.process.wait()
        if not self.has_begun:
            raise UserError(
                f"objective.function={self.function}: a process that was to import it ended with code {code} (see "
                "above): try python -c 'import ...' in the same folder, or objective.workers=0"
            )
        return f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process exited with {code}"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.asks.close()
        self.replies.close()


@lru_cache
def judges(function: str, workers: int) -> Judges:
    """The processes for a function, which stay until this one ends."""
    pool = Judges(function, workers)
    atexit.register(pool.close)
    return pool


def name_of(function: Any) -> str:
    """What another process finds a function by.

    Raises:
        UserError: there is no such name: a lambda, or one within a function.
    """
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", "") or "", getattr(function, "__qualname__", "")
    loaded = sys.modules.get(module)
    if module == "__main__" or not name.isidentifier() or getattr(loaded, name, None) is not function:
        raise UserError(
            "objective.workers calls the function in processes of their own, which have to import it: put it into a "
            f"module or a file and give its name (function='rewards.py:judge'), not {name or function!r}"
        )
    return f"{module}:{name}"


def raised(error: BaseException) -> str:
    """An error in a few words, with the last place in the user's code.

    Example:
        >>> raised(ZeroDivisionError("division by zero"))
        'ZeroDivisionError: division by zero'
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}"[:300] + where


def _line(function: str, job: Job) -> bytes:
    try:
        return json.dumps(job).encode() + b"\n"
    except TypeError as error:
        raise UserError(
            f"objective.workers hands what a row is judged by to another process as JSON, and {job[2]!r} is none "
            f"({error}): use text, numbers or lists in that column, or objective.workers=0"
        ) from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
