"""Claims: lock files by which processes on many machines share cells; those of dead processes are taken over."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

BEAT, STALE = 15.0, 180.0
"""Seconds between a claim holder's signs of life, and without one after which any process may take the claim."""


class Claim:
    """A file that one process made, and touches every few seconds while it lives.

    Args:
        path: the file.
        token: what is in it: who made it.
    """

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    def is_ours(self) -> bool:
        """Whether it is still ours: a process that was suspended for minutes may have lost it."""
        return _read(self.path) == self.token

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(BEAT) and self.is_ours():
            with contextlib.suppress(OSError):
                os.utime(self.path)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[Claim | None]:
    """Hold a claim while the block runs; None where another process holds it.

    The claim of a process that has died is taken over: at once where it ran on this machine, elsewhere when it has
    shown no sign of life for :data:`STALE` seconds by the file system's clock: machines need not agree on the time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    claim = Claim(path, f"process {os.getpid()} on {machine()} {uuid.uuid4().hex}")
    if not (_make(claim) or _take_over(claim)):
        yield None
        return
    done = threading.Event()
    beats = threading.Thread(target=claim._beat, args=(done,), daemon=True)
    beats.start()
    try:
        yield claim
    finally:
        done.set()
        beats.join()
        if claim.is_ours():
            path.unlink(missing_ok=True)


@cache
def machine() -> str:
    """This machine as process numbers mean it: two containers may share a name, and number their processes apart."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "-".join(parts)


def holder(path: Path) -> str:
    """The process that holds a claim; empty where none does."""
    return _read(path).rpartition(" ")[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _make(claim: Claim) -> bool:
    try:
        with claim.path.open("x", encoding="utf-8") as file:
            file.write(claim.token)
    except FileExistsError:
        return False
    return True


def _take_over(claim: Claim) -> bool:
    """Move a dead process's claim away and make our own; of several who try, one succeeds."""
    claimed = _read(claim.path)
    if not claimed or not _is_dead(claim.path, claimed):
        return False
    away = claim.path.with_name(f".{claim.path.name}.{uuid.uuid4().hex}")
    try:
        claim.path.rename(away)
    except OSError:
        return False
    if _read(away) != claimed:  # another process has taken it over since it was read: give it back
        with contextlib.suppress(OSError):
            os.link(away, claim.path)
        away.unlink(missing_ok=True)
        return False
    away.unlink(missing_ok=True)
    return _make(claim)


def _is_dead(path: Path, text: str) -> bool:
    words = text.split()
    if len(words) == 5 and words[3] == machine() and not _is_alive(words[1]):
        return True
    try:
        return _now(path.parent) - path.stat().st_mtime > STALE
    except OSError:
        return False  # it has just been let go of: the next look finds out


def _now(folder: Path) -> float:
    """The file system's time."""
    probe = folder / f".now-{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True
