"""A run's folder: claimed before anything is loaded, resumed by the same command, never overwritten."""

from __future__ import annotations

import difflib
import math
import os
import re
import socket
from pathlib import Path

from zoft.errors import UserError
from zoft.report.results import REPORT, finished
from zoft.utils import shared
from zoft.utils.files import is_unfinished, remove_unfinished, write_atomically

CONFIG, LOCK = "config.yaml", ".lock"
CHANGEABLE = re.compile(
    r"output_dir|config|budget\.queries|optimizer\.learning_rate|tracker\..*|diagnostics(\..*)?"
    r"|trainer\.(logging|eval|save|lr_scheduler|warmup|dataloader(?!_drop_last)|metric_for|greater_is|load_best|max_skipped|guard).*"
    r"|objective\.(workers|timeout|failed)|engine\.(url|folder|max_adapters|timeout|retries|file)"
    r"|trainer\.(per_device_train_batch_size|gradient_accumulation_steps|parallel(_directions)?|run_name|journal.*|frozen.*|ddp_timeout)"
)
"""Keys of a config that may differ when a run is resumed; batches may be cut in other ways of the same size, which the
journal checks."""
_BATCH = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")
_DECISIVE = re.compile(
    r"optimizer\.learning_rate|trainer\.(lr_scheduler|warmup|metric_for|greater_is|load_best|max_skipped|guard).*"
    rf"|{'|'.join(map(re.escape, _BATCH))}"
)
_DATA = re.compile(r"^# task\..* has the SHA-256 .*\n", re.MULTILINE)
_IGNORED = {".hydra", "multirun.yaml", ".submitit", LOCK}
_held: dict[Path, int] = {}  # folder -> the open file of the lock that this process holds
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)  # a fork of this process is not the one that claimed it
_ATTEMPTS = 20
_LARGEST = 1 << 22  # bytes of a config.yaml


def claim(output_dir: str, resolved: str) -> str:
    """Decide what a run may do with its folder, lock it against other processes, and put its resolved config there.

    Two runs are the same when their configs are, but for :data:`CHANGEABLE` keys: the folder may be moved, and budget,
    logging and learning rate be changed. A finished run with a larger budget than before goes on.

    Returns:
        ``new`` (the folder was empty or absent), ``resume`` (it holds this very run, unfinished) or ``done``.

    Raises:
        UserError: not writable, in use, holding another run (the differing lines are shown) or something else.
    """
    if _standing(output_dir, resolved) == "done":
        return "done"
    _lock(output_dir)
    try:
        standing = _standing(output_dir, resolved)  # anew: another process may have just finished it
        if standing != "done":
            remove_unfinished(Path(output_dir))
        if standing == "new":
            _write(output_dir, resolved)
    except BaseException:
        unlock(output_dir)
        raise
    if standing == "done":
        unlock(output_dir)
    elif standing == "resume":
        (Path(output_dir) / REPORT).unlink(missing_ok=True)  # what it says is not the end any more
        _write(output_dir, resolved)
    return standing


def config_of(run: str) -> Path:
    """The config of a run's folder, once it is one that zoft has written there.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(run) / CONFIG
    if not path.is_file():
        raise UserError(f"run={run} holds no {CONFIG}: give the folder of a run of zoft train")
    keys = {key for key, _ in keys_of(_config_text(path))}
    missing = [key for key in ("model.name", "budget.queries", "seed") if key not in keys]
    if missing:
        raise UserError(
            f"{path} says nothing of {' and '.join(missing)}: it is damaged, or was not written by zoft train; put it "
            "back, or repeat the run in another folder"
        )
    return path


def _config_text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged; choose another folder") from None


def _standing(output_dir: str, resolved: str) -> str:
    folder = Path(output_dir)
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"output_dir={_short(output_dir)} cannot be a folder ({why}): choose another one") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={output_dir} is a file: give a folder")
    held = _content(folder)
    if held and CONFIG not in held:
        shown = ", ".join(sorted(held)[:3])
        raise UserError(
            f"output_dir={output_dir} is not empty and holds no run of zoft ({shown}): choose another folder"
        )
    if CONFIG in held:
        earlier = _config_text(folder / CONFIG)
        then, now = _identity(earlier), _identity(resolved)
        if then != now:
            raise UserError(
                f"output_dir={output_dir} holds another run; it differs in\n{_difference(then, now)}\n"
                "choose another output_dir, or repeat that run's command to resume it"
            )
        if _budget(resolved) > _budget(earlier) or not finished(folder):
            return "resume"
        if _DATA.search(earlier) is None:  # written before digests of rows were
            resolved = _DATA.sub("", resolved)
        then, now = _way_to_its_end(earlier), _way_to_its_end(resolved)
        if then != now:
            raise UserError(
                f"output_dir={output_dir} holds this run, finished with other settings or rows:\n"
                f"{_difference(then, now)}\nchoose another output_dir, or go on from its end with these and a larger "
                "budget.queries"
            )
        return "done"
    return "new"


def _content(folder: Path) -> set[str]:
    """Names in a folder, but for what schedulers leave there, the lock, and what a write that was killed has left."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names - _IGNORED if not is_unfinished(name)}


def unlock(output_dir: str) -> None:
    """Let other processes have the folder; nothing of the lock remains. Does nothing where none is held."""
    file = _held.pop(Path(output_dir).absolute(), None)
    if file is not None:
        (Path(output_dir) / LOCK).unlink(missing_ok=True)
        shared.close(file)


def nearest(output_dir: str) -> Path:
    """The folder itself where it exists, else the nearest one above it that does."""
    folder = Path(output_dir)
    return next(path for path in (folder, *folder.parents) if os.path.exists(path) or path == path.parent)


def release(output_dir: str, nearest_folder: Path) -> None:
    """Take back a claim on a folder in which nothing has happened yet, so that a failed start leaves nothing behind.

    Args:
        output_dir: the folder that was claimed.
        nearest_folder: what :func:`nearest` said before the claim: it and what is above it was not made by the claim.
    """
    folder = Path(output_dir)
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, LOCK}:
        (folder / CONFIG).unlink(missing_ok=True)
        unlock(output_dir)
        while folder != nearest_folder:
            try:
                folder.rmdir()
            except OSError:  # not empty
                return
            folder = folder.parent


def _lock(output_dir: str) -> None:
    """Take the lock. The system holds it for this process, so a process that was killed has let go of it."""
    path = Path(output_dir) / LOCK
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = shared.no_link(str(path), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt + 1 < _ATTEMPTS:
                continue  # another process has just taken its own failed start back
            raise _not_writable(output_dir, error) from None
        if not shared.lock(file):
            owner = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise UserError(
                f"output_dir={output_dir} is in use by {owner}: wait until it ends, or choose another folder"
            )
        if os.fstat(file).st_nlink:
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            _held[path.parent.absolute()] = file
            return
        shared.close(file)  # it was removed between opening and locking it
    raise UserError(f"output_dir={output_dir} is being made and removed by other runs: choose another folder")


def _write(output_dir: str, resolved: str) -> None:
    try:
        write_atomically(Path(output_dir) / CONFIG, resolved)
    except OSError as error:
        raise _not_writable(output_dir, error) from None


def _not_writable(output_dir: str, error: OSError) -> UserError:
    return UserError(f"output_dir={output_dir} is not writable ({error.strerror}): choose another folder")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}...{text[-30:]}"


def _identity(resolved: str) -> str:
    """The lines of a config that a resumed run must share; of rows its journal knows more than that files differ."""
    resolved = _DATA.sub("", resolved)
    return "".join(f"{line}\n" for key, line in keys_of(resolved) if not CHANGEABLE.fullmatch(key))


def _way_to_its_end(resolved: str) -> str:
    """Of what may differ when a run is resumed, or is seen later, the lines on which depends how it ends."""
    lines = {key: line for key, line in keys_of(resolved) if _DECISIVE.fullmatch(key)}
    batch = [int(lines.pop(key, ":1").split(":")[1]) for key in _BATCH]  # may be cut in another way
    data = [line.strip() for line in _DATA.findall(resolved)]
    return "\n".join([*data, *sorted(lines.values()), f"  rows of a step: {math.prod(batch)}"])


def _budget(resolved: str) -> int:
    budgets = [line.split(":")[1] for key, line in keys_of(resolved) if key == "budget.queries"]
    return int(budgets[0]) if budgets and budgets[0].strip().isdecimal() else 0


def keys_of(resolved: str) -> list[tuple[str, str]]:
    """(dotted key, line) of a config's text; a line without a key of its own belongs to the key above it."""
    above: list[tuple[int, str]] = []  # (indentation, key)
    lines = []
    for line in resolved.splitlines():
        match = re.match(r"( *)([^\s:#'\"-][^:]*):(?: |$)", line)
        if match:
            indent = len(match.group(1))
            above = [*((i, key) for i, key in above if i < indent), (indent, match.group(2))]
        lines.append((".".join(key for _, key in above), line))
    return lines


def _difference(earlier: str, now: str) -> str:
    lines = difflib.unified_diff(earlier.splitlines(), now.splitlines(), "there", "now", n=0, lineterm="")
    return "\n".join(f"  {line}" for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---")))
