"""Jobs in processes of their own: what kills one (memory, a crash) fails that job and not the search."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from zoft.errors import UserError
from zoft.tuning.evaluation import FAILED, Job, JobOutcome

Work = Callable[[Job], JobOutcome]
"""Carries out a job; it returns failures, and raises a :class:`zoft.errors.UserError` for what no job will survive."""

_PATIENCE = 5.0  # seconds that a worker has to save when the search is stopped


class Workers:
    """Runs jobs here, or ``count`` at a time in other processes.

    Args:
        work: carries out a job; for other processes it must be picklable (its function at the top of a module).
        count: how many processes.
        isolated: use another process for ``count=1`` too.

    Raises:
        UserError: ``work`` cannot be sent.
    """

    def __init__(self, work: Work, count: int, *, isolated: bool = False) -> None:
        self.work = work
        self.count = count if count > 1 or isolated else 0
        self.payload = b""
        if self.count:
            try:
                self.payload = pickle.dumps(work)
            except Exception as error:
                raise UserError(
                    f"f cannot be sent to other processes ({error}): define it at the top of a module, or use workers=1"
                ) from None
        self.workers: list[_Worker] = []

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, JobOutcome]]:
        """(index of a job, what came of it), as they end."""
        if not self.count:
            yield from ((index, self.work(job)) for index, job in enumerate(jobs))
            return
        waiting = list(enumerate(jobs))[::-1]
        busy: dict[Any, _Worker] = {}
        while waiting or busy:
            while waiting and len(busy) < self.count:
                worker = self._idle(busy)
                worker.begin(*waiting.pop())
                busy[worker.line] = worker
            for line in wait(list(busy)):
                worker = busy[line]
                outcome = worker.hear()
                if outcome is None:
                    continue
                del busy[line]
                if not worker.process.is_alive():
                    self.workers.remove(worker)
                yield worker.index, outcome

    def _idle(self, busy: dict[Any, _Worker]) -> _Worker:
        for worker in self.workers:
            if worker.line not in busy and worker.process.is_alive():
                return worker
        self.workers.append(_Worker(self.payload))
        return self.workers[-1]

    def close(self) -> None:
        """End the processes: those at work get the signal a scheduler sends (SIGTERM), and may save first."""
        for worker in self.workers:
            if worker.busy:
                worker.process.terminate()
            worker.line.close()  # who waits for a job leaves
        until = time.monotonic() + _PATIENCE
        for worker in self.workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self.workers = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A process that carries out one job after another."""

    def __init__(self, payload: bytes) -> None:
        # "spawn": a forked copy of a process in which torch has threads may hang
        context = multiprocessing.get_context("spawn")
        self.line, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, payload), daemon=False)
        self.process.start()
        other.close()
        self.index, self.began, self.started, self.busy = 0, 0.0, False, False

    def begin(self, index: int, job: Job) -> None:
        self.index, self.began, self.busy = index, time.monotonic(), True
        self.line.send(job)

    def hear(self) -> JobOutcome | None:
        """The job's outcome; None for the first message, which says that the process has started."""
        try:
            answer = self.line.recv()
        except (EOFError, OSError):
            return self._dead()
        if isinstance(answer, UserError):
            self.busy = False
            raise answer
        self.started = True
        if not isinstance(answer, JobOutcome):
            return None
        self.busy = False
        return answer

    def _dead(self) -> JobOutcome:
        self.process.join()
        if not self.started:
            raise UserError(
                "a worker process could not start (a script needs an `if __name__ == '__main__':` guard, which other "
                "processes import it by)"
            ) from None
        code = self.process.exitcode or 0
        why = f"killed by signal {-code}; out of memory?" if code < 0 else f"exit code {code}"
        return JobOutcome(FAILED, error=f"its process died ({why})", seconds=time.monotonic() - self.began)


def _serve(line: Connection, payload: bytes) -> None:
    """In the worker: jobs come, outcomes go; it does not outlive the search."""
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    try:
        work = pickle.loads(payload)
        line.send(True)
        while True:
            job = line.recv()
            try:
                line.send(work(job))
            except UserError as error:
                line.send(UserError(str(error)))
    except (EOFError, OSError, KeyboardInterrupt):
        return


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
