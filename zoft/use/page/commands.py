"""From the page's fields to a command of zoft, which is shown and run in a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from zoft.errors import UserError

MOST_RUNS = 50
"""Earlier runs that can be chosen."""
LAST_LINES = 200
"""Lines of a process's output that the page shows."""


@dataclass(frozen=True)
class Fields:
    """The fields of the page.

    Args:
        config: an experiment by name or path; empty for none.
        model: hub name, folder or ``zoft:NAME``; empty for the config's.
        data: a file of rows; empty for the config's.
        more: other arguments, as on a command line.
        output_dir: the run's folder; empty for the default.
    """

    config: str = "quickstart"
    model: str = ""
    data: str = ""
    more: str = ""
    output_dir: str = ""

    def words(self) -> list[str]:
        """Arguments of `zoft train`.

        Raises:
            UserError: quotes that do not close.

        Example:
            >>> Fields(config="classify", data="mail.csv", more="'task.words={0: No, 1: Yes}' seed=1").words()
            ['config=classify', 'task.train=mail.csv', 'task.words={0: No, 1: Yes}', 'seed=1']
        """
        try:
            more = shlex.split(self.more)
        except ValueError as error:
            raise UserError(f"cannot read the other arguments ({error}): write them as in a shell") from None
        named = {"config": self.config, "model.name": self.model, "task.train": self.data}
        folder = [f"output_dir={self.output_dir.strip()}"] if self.output_dir.strip() else []
        return [f"{key}={value.strip()}" for key, value in named.items() if value.strip()] + more + folder


def earlier_runs(root: Path = Path("runs")) -> list[str]:
    """Folders of runs below a folder, the newest first."""
    folders = [path.parent for path in root.glob("*/config.yaml")] + [
        path.parent for path in root.glob("*/*/config.yaml")
    ]
    return [str(run) for run in sorted(folders, key=lambda run: run.stat().st_mtime, reverse=True)][:MOST_RUNS]


def state_of(run: str) -> str:
    """How an earlier run stands, for people."""
    from zoft.report.report import summary_lines
    from zoft.report.results import finished, read_metrics

    facts = finished(Path(run))
    if facts is not None:
        return "\n".join([f"{run} is finished: try it or export it below", *summary_lines(facts)])
    steps = max((row["step"] for row in read_metrics(run)), default=0)
    return f"{run} has come to step {steps:,}: Start or go on takes it up from there"


def shown(verb: str, words: list[str]) -> str:
    """The command as one would type it.

    Example:
        >>> shown("predict", ["run=runs/a b", "data=new.csv"])
        "zoft predict 'run=runs/a b' data=new.csv"
    """
    return shlex.join(["zoft", verb, *words])


def answer(verb: str, words: list[str], *, typed: str = "") -> str:
    """What a verb prints, whole; for those that end by themselves."""
    done = subprocess.run(
        _command(verb, words), input=typed, capture_output=True, text=True, check=False, env=_environment()
    )
    return (done.stdout + done.stderr).strip()


@dataclass
class Running:
    """A training of the page: a process, and the file that its output goes to."""

    log: Path
    process: subprocess.Popen[bytes] | None = None
    command: str = ""
    words: list[str] = field(default_factory=list)

    def start(self, words: list[str]) -> None:
        """Begin, or go on: the same words resume a run that was stopped.

        Raises:
            UserError: a training of this page is still on.
        """
        if self.is_on:
            raise UserError("a training is on: stop it first, or open another page with `zoft ui port=...`")
        self.command, self.words = shown("train", words), words
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                _command("train", words),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # Ctrl-C ends the page and not the training
            )

    @property
    def is_on(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ask it to save and to leave (SIGTERM); the same words go on from there."""
        if self.process is not None and self.is_on:
            self.process.send_signal(signal.SIGTERM)

    def text(self) -> str:
        """The last lines that it printed."""
        if not self.log.is_file():
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


def _command(verb: str, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "zoft", verb, *words]


def _environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "110", "PYTHONUNBUFFERED": "1"}
