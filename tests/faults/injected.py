"""What can be put into a run before it begins: each function patches this process, and nothing undoes it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def die() -> None:
    """As a process that is killed: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def count_steps(file: str) -> None:
    """Write the number of steps whose weights are written into a file, as eight bytes."""
    from zoft.step.update import ZOOptimizer

    step, opened = ZOOptimizer.step, os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)

    def counted(self: Any, closure: Any = None) -> None:
        step(self, closure)
        os.pwrite(opened, self.progress.steps.to_bytes(8, "little"), 0)

    ZOOptimizer.step = counted  # type: ignore[method-assign]


def steps_counted(file: Path) -> int:
    """What :func:`count_steps` has written last."""
    return int.from_bytes(file.read_bytes(), "little") if file.exists() else 0


def die_in_query(count: int, told: str) -> None:
    """Die in the forward pass of the query of this number, once the run asks queries at all.

    Whether the weights stand away from where the step began is left in the file ``told``.
    """
    from zoft.step.query import StepQueries
    from zoft.trainer.trainer import ZOMixin
    from zoft.weights.tensors import Weights

    compute, ask = ZOMixin.compute_loss, StepQueries.estimate
    asked: dict[str, Any] = {"count": 0, "inside": False, "clean": None}

    def query(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked["inside"], asked["clean"] = True, Weights(self.session.model).digest()
        try:
            return ask(self, *args, **kwargs)
        finally:
            asked["inside"] = False

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if asked["inside"]:
            asked["count"] += 1
            if asked["count"] >= count:
                moved = Weights(self.model).digest() != asked["clean"]
                if moved:
                    Path(told).write_text("moved")
                    die()
        return compute(self, *args, **kwargs)

    ZOMixin.compute_loss, StepQueries.estimate = counted, query  # type: ignore[method-assign]


def die_in_save(count: int, told: str, save: int = 1) -> None:
    """Die at the call of this number that a save makes of the disk: in the middle of a write, before and after others.

    Args:
        count: number of the point, from 0; one that no save reaches does nothing.
        told: a file that gets the number of points in the save.
        save: which save of the process.
    """
    import transformers.modeling_utils as modeling

    from zoft.trainer.trainer import ZOMixin

    state = {"saves": 0, "points": 0, "inside": False}

    def point() -> None:
        if state["inside"]:
            if state["points"] == count:
                die()
            state["points"] += 1

    def around(module: Any, name: str) -> None:
        call = getattr(module, name)

        def surrounded(*args: Any, **kwargs: Any) -> Any:
            point()
            done = call(*args, **kwargs)
            point()
            return done

        setattr(module, name, surrounded)

    def halved(kind: type, name: str) -> None:
        write = getattr(kind, name)

        def in_the_middle(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            if state["inside"] and state["points"] == count:
                write(self, data[: len(data) // 2], *args, **kwargs)
            point()
            return write(self, data, *args, **kwargs)

        setattr(kind, name, in_the_middle)

    for name in ("fsync", "fdatasync", "rename", "replace", "mkdir", "rmdir", "unlink", "pwrite"):
        around(os, name)
    around(modeling, "safe_save_file")
    halved(Path, "write_bytes")
    halved(Path, "write_text")
    save_checkpoint = ZOMixin._save_checkpoint

    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        state["saves"] += 1
        state["inside"] = state["saves"] == save
        try:
            return save_checkpoint(self, *args, **kwargs)
        finally:
            if state["inside"]:
                Path(told).write_text(str(state["points"]))
            state["inside"] = False

    ZOMixin._save_checkpoint = saving  # type: ignore[method-assign]


def signal_in_query(step: int, numbers: list[int], seconds: float = 0.0) -> None:
    """Send this process signals in the middle of a step, which then takes so long."""
    import time

    from zoft.trainer.trainer import ZOMixin

    compute, sent = ZOMixin.compute_loss, []

    def heard(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.query_forward.is_querying and self.progress.steps == step and not sent:
            sent.append(time.perf_counter())
            for number in numbers:
                os.kill(os.getpid(), number)
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                time.sleep(0.01)
        return compute(self, *args, **kwargs)

    ZOMixin.compute_loss = heard  # type: ignore[method-assign]


def flip_weight(rank: int, step: int) -> None:
    """After so many steps, one bit of one weight of one process is another: a faulty memory."""
    import torch

    from zoft.step.update import ZOOptimizer

    write = ZOOptimizer.step

    def flipped(self: Any, closure: Any = None) -> None:
        write(self, closure)
        if int(os.environ.get("RANK", "0")) == rank and self.progress.steps == step:
            weight = next(iter(self.session.weights.tensors.values()))
            with torch.no_grad():
                weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    ZOOptimizer.step = flipped  # type: ignore[method-assign]


def report_memory(file: str, every: int) -> None:
    """Write resident memory (KiB) and open files every so many steps, one line each."""
    from zoft.step.update import ZOOptimizer

    write, opened = ZOOptimizer.step, Path(file).open("w")  # noqa: SIM115  # as long as the process lives

    def reporting_step(self: Any, closure: Any = None) -> None:
        write(self, closure)
        if self.progress.steps % every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            opened.write(f"{self.progress.steps} {pages * os.sysconf('SC_PAGE_SIZE') // 1024} {files}\n")
            opened.flush()

    ZOOptimizer.step = reporting_step  # type: ignore[method-assign]
