"""The command line: which verb, and what an error looks like to a user. Verbs import what they need when they run."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import threading
from typing import Any

from zoft.cli.verbs import VERBS

SUCCESS, RUN_FAILED, BAD_INPUT, REQUEUE, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes."""

_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_CLOSED |= {errno.EEXIST}  # a file where a folder is wanted
_ASK_FOR_ANOTHER_START = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after ``zoft``; None takes the process's own.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 something the user can mend, 75 stopped by a
        signal and to be started again, 130 interrupted.

    Example:
        >>> main(["version"])  # doctest: +ELLIPSIS
        zoft ...
        0
    """
    before = {number: signal.getsignal(number) for number in _ASK_FOR_ANOTHER_START}
    try:
        return _ended(list(sys.argv[1:] if argv is None else argv))
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def run() -> None:
    """Run the process's own command and exit with its code: what the entry point of ``python -m zoft`` calls."""
    code = _ended(sys.argv[1:])
    # the interpreter gives handlers back as it clears up, and a signal would kill it then: the code is decided
    for number in _ASK_FOR_ANOTHER_START:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def requeue_on_signals() -> None:
    """SIGTERM and SIGUSR1 end the verb with :data:`REQUEUE` from here on, also before and after the training itself.

    The first raises Requeued, a further one leaves at once with the same code. Not under torchrun: a process that waits
    for others runs no handler, and has to die of the signal itself.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread():
        for number in _ASK_FOR_ANOTHER_START:
            signal.signal(number, _requeue)


def _requeue(*_: Any) -> None:
    from zoft.errors import Requeued

    _leave_at_the_next()
    raise Requeued


def _leave_at_the_next() -> None:
    for number in _ASK_FOR_ANOTHER_START:
        if signal.getsignal(number) is _requeue:
            signal.signal(number, lambda *_: os._exit(REQUEUE))


def _ended(arguments: list[str]) -> int:
    """Carry the command out, and say how it ended: its exit code."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt as stop:
        _leave_at_the_next()
        # by name: it need not be loaded for Ctrl-C
        requeued = any(cls.__name__ == "Requeued" for cls in type(stop).__mro__)
        _complain(str(stop) or ("stopped by a signal; the same command goes on" if requeued else "interrupted"))
        return REQUEUE if requeued else INTERRUPTED
    except BrokenPipeError:  # `zoft ls | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # the interpreter flushes it at exit
        return SUCCESS
    except Exception as error:
        from zoft.errors import NonFiniteLossError, UserError

        closed = _of_a_path(error)
        if os.environ.get("ZOFT_TRACEBACK") or not (closed or isinstance(error, UserError | NonFiniteLossError)):
            raise
        _complain(f"error: {closed or error}")
        return RUN_FAILED if isinstance(error, NonFiniteLossError) else BAD_INPUT


def _of_a_path(error: Exception) -> str | None:
    """What to say of a file or folder that cannot be read or written, whichever verb met it; None of other errors."""
    from zoft.errors import os_error_of

    said = os_error_of(error) or OSError()
    if said.errno in (errno.ENOSPC, errno.EDQUOT):
        where = said.filename2 or said.filename or "what this command writes"
        return f"the disk of {where} is full: free some space and repeat the command"
    is_closed = said.errno in _CLOSED and said.filename is not None
    return f"{said.filename}: {said.strerror}: name a path that you may read and write" if is_closed else None


def _dispatch(arguments: list[str]) -> int:
    from zoft.cli import help_text

    _require_a_folder()

    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(help_text.of(rest[0] if rest else None))
        return SUCCESS
    if verb in ("-V", "--version"):
        verb = "version"
    if verb not in VERBS:
        from zoft.errors import UserError, did_you_mean

        hint = " Did you mean zoft train?" if "=" in verb else did_you_mean(verb, VERBS)
        raise UserError(f"there is no command called {verb!r}.{hint} See zoft --help")
    if any(argument in ("-h", "--help") for argument in rest):
        print(help_text.of(verb))
        return SUCCESS
    return int(importlib.import_module(f"zoft.cli.{verb}").command(rest))


def _require_a_folder() -> None:
    """Refuse to work in a folder that was removed: every relative path begins there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        from zoft.errors import UserError

        raise UserError("the folder that this command was started in has been removed: cd to another one") from None


def _complain(message: str) -> None:
    # Every process of a torchrun finds the same mistake; one says so.
    if os.environ.get("RANK", "0") == "0":
        from zoft.utils.terminal import fitted

        print(fitted(f"zoft: {message}", sys.stderr), file=sys.stderr)
