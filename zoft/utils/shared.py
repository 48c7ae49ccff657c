"""Files in folders that others can write to: opened without following links, and locked by one process alone."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

from zoft.errors import UserError

_locked: set[int] = set()  # open files whose lock this process holds


def no_link(path: str, flags: int) -> int:
    """An opener for :func:`open` that refuses links of both kinds: writing through one would change another file.

    Raises:
        UserError: it is a symbolic link, or a file that has another name too.
        OSError: as the system says.
    """
    try:
        # O_TRUNC comes later: nothing may be cut before it is known what the name leads to
        file = os.open(path, flags & ~os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and os.path.islink(path):
            raise UserError(
                f"{path} is a symbolic link to {os.readlink(path)}, which is not written to: remove the link"
            ) from None
        raise
    about = os.fstat(file)
    # another name for the same file: writing here would change it there
    if stat.S_ISREG(about.st_mode) and about.st_nlink > 1:
        os.close(file)
        raise UserError(
            f"{path} is a hard link: the same file has another name, which would change with it: put a copy in its "
            "place, or remove it"
        )
    if flags & os.O_TRUNC:
        os.ftruncate(file, 0)
    return file


def open_own(path: Path, mode: str, **given: Any) -> IO[Any]:
    """``open`` for writing, for a file of a run's folder; a symbolic link is refused."""
    return open(path, mode, opener=no_link, **given)


def lock(file: int) -> bool:
    """Lock an open file for this process and not for processes that it forks; whether nobody else has it locked.

    A lock of ``flock`` lasts as long as anybody has the open file, and a data loader's workers have it by inheritance:
    they may outlive a process that is killed. So they close it as soon as they begin.

    Args:
        file: a file descriptor, to be closed with :func:`close`.
    """
    try:
        import fcntl

        # without waiting: the caller says who has it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True  # Windows, or a file system without locks: processes are on their own there
    _locked.add(file)
    return True


def close(file: int) -> None:
    """Let go of a lock, and close the file."""
    _locked.discard(file)
    os.close(file)


def _close_in_child() -> None:
    for file in _locked:
        os.close(file)
    # a child that keeps it open would keep the lock after its parent has died
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
