"""Processes of `zoft` that can be killed for real and start in no time: forked from a process that has loaded all.

The process that is asked (``python -m tests.faults.zygote``) reads one JSON object a line: start a run, or wait for
one. A run is a process of its own, with its own signals, locks and files; only its imports are inherited.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.runs import REPOSITORY, environment


class Zygote:
    """Asks the process of runs; one a test session, closed when done."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.zygote"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({})  # everything is loaded when it answers

    def run(self, words: list[str], log: Path, *, faults: dict[str, Any] | None = None, **env: str) -> Run:
        """Start ``zoft train``; its output goes to the file ``log``, ``faults`` (of :mod:`.injected`) are put in."""
        return self.start(["train", *words], log, faults=faults, env=env)

    def start(self, words: list[str], log: Path, *, errors: Path | None = None, **more: Any) -> Run:
        """Start ``zoft`` with any verb; what it says of errors goes to a file of its own where one is given.

        Args:
            words: after ``zoft``, or what a ``module`` is given.
            log: gets its output.
            errors: gets its standard error.
            more: ``faults``, variables of its ``env`` (with ``anew`` it has no others), its ``cwd``, or the file that
                is its ``input``.
        """
        pid = self._ask({"words": words, "told": str(log), "errors": str(errors or log)} | more)["pid"]
        return Run(self, pid, log)

    def ranks(self, words: list[str], log: Path, count: int = 2, **given: Any) -> list[Run]:
        """The processes of one run, as torchrun would start them."""
        return [self.run(words, log.with_suffix(f".{rank}"), **env, **given) for rank, env in enumerate(_ranks(count))]

    def program(self, module: str, folder: Path, count: int = 2) -> None:
        """Let ranks call ``main(folder)`` of a module, and wait; raises what one of them says where one fails."""
        runs = [
            self.start([str(folder)], folder / f"told.{rank}", module=module, env=env, cwd=str(folder))
            for rank, env in enumerate(_ranks(count))
        ]
        failed = [run.output()[-3000:] for run in runs if run.wait(500) != 0]
        assert not failed, failed[0]

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


def _ranks(count: int) -> list[dict[str, str]]:
    """The variables of each of so many processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]


@dataclass
class Run:
    """One process of `zoft train`."""

    zygote: Zygote
    pid: int
    told: Path
    code: int | None = None
    began: float = field(default_factory=time.perf_counter)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, where it still lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number where one ended it; None while it lives."""
        if self.code is None:
            self.code = self.zygote._ask({"wait": self.pid})["code"]
        return self.code

    def wait(self, seconds: float = 200.0) -> int:
        """The exit code, once it has ended."""
        until = time.perf_counter() + seconds
        while self.poll() is None:
            if time.perf_counter() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.told} has not ended within {seconds} s")
            time.sleep(0.02)  # asking costs both processes something
        assert self.code is not None
        return self.code

    def output(self) -> str:
        """What it has said."""
        return self.told.read_text(errors="replace")


LOADED = (
    "accelerate",
    "matplotlib.pyplot",
    "peft",
    "transformers.models.llama.modeling_llama",
    "zoft.cli.train",
    "zoft.config.loader",
    "zoft.lm.metrics.metrics",
    "zoft.trainer.signals",
    "zoft.run.replay",
    "zoft.report.console",
    "zoft.report.plots",
    "zoft.report.report",
    "zoft.run.train",
    "zoft.trainer.trainer",
)
"""What a run needs, and would otherwise load in every process."""


@cache
def shared() -> Zygote:
    """The one of this process, started when it is first asked for."""
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


# ---- the process that is asked ---------------------------------------------------------------------------------------


def serve() -> None:
    """Answer until the questions end; what still runs then is killed."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may get between answers
    _load_everything()
    living: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        reply: dict[str, Any] = {}
        if "words" in question:
            pid = os.fork()
            if pid == 0:
                answer.close()
                _be_a_run(question)
            living.add(pid)
            reply = {"pid": pid}
        elif "wait" in question:
            ended, status = os.waitpid(question["wait"], os.WNOHANG)
            living.discard(ended)
            reply = {"code": os.waitstatus_to_exitcode(status) if ended else None}
        answer.write(json.dumps(reply) + "\n")
        answer.flush()
    for pid in living:
        os.kill(pid, signal.SIGKILL)


def _load_everything() -> None:
    """Import, and compose a config: what is slow about a start."""
    for name in LOADED:
        importlib.import_module(name)
    import transformers

    assert transformers.LlamaForCausalLM
    assert transformers.PreTrainedTokenizerFast
    from zoft.config import compose

    compose(["config=quickstart"])
    gc.collect()
    gc.freeze()  # as in conftest.py: every run looks through all there is before it trains


def _be_a_run(question: dict[str, Any]) -> None:
    code = 1
    try:
        os.dup2(os.open(question.get("input") or os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)
        for number, name in ((1, question["told"]), (2, question["errors"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        if question.get("anew"):
            os.environ.clear()
        os.environ.update(question.get("env") or {})
        os.chdir(question.get("cwd") or ".")
        from tests.faults import injected
        from zoft.cli import run

        for name, given in (question.get("faults") or {}).items():
            getattr(injected, name)(**given)
        sys.argv = ["zoft", *question["words"]]
        if "module" in question:
            importlib.import_module(question["module"]).main(*map(Path, question["words"]))
            sys.exit(0)
        run()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
