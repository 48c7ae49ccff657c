"""Snapshots: checkpoint-N folders that are whole and unchanged, or do not count.

A folder is filled under another name, every file flushed to the disk, a manifest of sizes and SHA-256 written last,
and the folder renamed: at no moment is there a ``checkpoint-N`` that is not complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoft.errors import DiskFullError, UserError, os_error_of
from zoft.utils.lazy import torch

log = logging.getLogger(__name__)

MANIFEST, OPTIMIZER = "manifest.json", "optimizer.safetensors"
FORMAT = 1
_LARGEST = 1 << 26  # bytes of a manifest
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGED = re.compile(r"\.checkpoint-\d+\.(saving|replaced)")


@contextmanager
def staged(target: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well, and vanishes when it does not.

    Args:
        target: the checkpoint's folder; one that is there is replaced.
        facts: what the manifest says beside the files (``run``, ``step``).

    Raises:
        DiskFullError: the disk is full, with what is missing; what was there before is untouched.
    """
    folder = target.with_name(f".{target.name}.saving")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        _write_manifest(folder, facts)
        _sync(folder)
        replaced = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
        _sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
        shutil.rmtree(folder, ignore_errors=True)
        said = os_error_of(error) if isinstance(error, Exception) else None
        if said is None:
            raise
        raise DiskFullError.of(said, target, size) from None


def verify(folder: Path, run: str | None = None) -> dict[str, Any]:
    """The manifest's facts, once every file is what was written.

    Args:
        folder: a checkpoint.
        run: identifier of the run that it must belong to; None takes any.

    Raises:
        UserError: naming the file that is missing, changed, or was not written by zoft.
    """
    facts, files = _manifest(folder)
    step, named = facts.get("step"), _NAME.fullmatch(folder.name)
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise UserError(f"{folder / MANIFEST} names no step: it is damaged")
    if named is not None and int(named.group(1)) != step:
        raise UserError(f"{folder} is the checkpoint of step {step}: give it its name checkpoint-{step} back")
    if run is not None and facts.get("run") != run:
        raise UserError(f"{folder} belongs to another run: its manifest says {facts.get('run')}, this one is {run}")
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    for name, entry in files.items():
        if name not in present:
            raise UserError(f"{folder / name} is missing: the checkpoint is not whole")
        if (folder / name).stat().st_size != entry["size"]:
            size = (folder / name).stat().st_size
            raise UserError(f"{folder / name} has {size:,} bytes and was written with {entry['size']:,}: it is damaged")
        if _sha256(folder / name) != entry["sha256"]:
            raise UserError(f"{folder / name} is not what was written (its SHA-256 differs): it is damaged")
    for name in sorted(present - set(files)):
        raise UserError(f"{folder / name} was not written with the checkpoint: remove it")
    return facts


def facts_of(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says beside its files, which are not looked at."""
    return _manifest(folder)[0]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within this block a file of a whole checkpoint is taken in; what is not as zoft writes it is a sentence.

    A manifest is no signature: anybody can write one for other files.

    Raises:
        UserError: naming ``path``.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} is not what zoft writes ({said}): remove the checkpoint, and the run goes on from the one before"
        ) from error


def newest(output_dir: Path, run: str | None = None) -> Path | None:
    """The checkpoint with the highest step that is whole and of this run; what is passed over is said.

    Args:
        output_dir: the run's folder.
        run: identifier of the run; None takes any.
    """
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        try:
            verify(folder, run)
        except UserError as error:
            log.warning("%s; an earlier checkpoint is used", error)
        else:
            if OPTIMIZER in _manifest(folder)[1]:  # else of trainer.save_only_model: nothing to go on from
                return folder
    return None


def refuse_full_disk(target: Path, size: int) -> None:
    """Say that a checkpoint will not fit before anything of it is written.

    Args:
        target: its folder.
        size: bytes that it takes at least.

    Raises:
        DiskFullError: with the bytes that are wanted and free.
    """
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if shutil.disk_usage(existing).free < size:
        raise DiskFullError.of(OSError(errno.ENOSPC, ""), target, size)


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a save that was killed has left; a checkpoint it was replacing comes back."""
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if _STAGED.fullmatch(folder.name):
            target = folder.with_name(folder.name[1:].rsplit(".", 1)[0])
            if folder.name.endswith(".replaced") and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``target`` when the block ends well; it has no manifest.

    Nothing is written into what is there: it may be a link to somewhere else.

    Args:
        target: the folder; its parent is made.
    """
    folder = target.with_name(f".{target.name}.saving")
    _remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
        _remove(target)
        folder.rename(target)
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def rotate(written: Path, most: int, protected: Collection[str]) -> None:
    """Remove the checkpoints of the lowest steps beyond ``most``; those of later steps are another session's.

    Args:
        written: the one that was just saved, which stays.
        most: how many to keep, this one included.
        protected: names of others that stay whatever their step is.
    """
    earlier = sorted((c for c in checkpoints(written.parent) if step_of(c) < step_of(written)), key=step_of)
    staying = [one for one in earlier if one.name in protected]
    removable = [one for one in earlier if one.name not in protected]
    for folder in removable[: max(0, len(removable) - max(0, most - 1 - len(staying)))]:
        shutil.rmtree(folder, ignore_errors=True)


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders that are called like checkpoints."""
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    return [folder for folder in folders if folder.is_dir() and _NAME.fullmatch(folder.name)]


def step_of(folder: Path) -> int:
    """The number in a checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))


# ---- the manifest ----------------------------------------------------------------------------------------------------


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _sync(file)
            files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        else:
            _sync(file)
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1, sort_keys=True)
    first = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(f"{first}\n{text}\n", encoding="utf-8")
    _sync(folder / MANIFEST)


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST}: it was not written by this zoft, or by a Trainer without it; "
            "load its weights with from_pretrained and start a new run"
        )
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        first, text = path.read_bytes().split(b"\n", 1)
        is_whole = hashlib.sha256(text[:-1]).hexdigest().encode() == first and text.endswith(b"\n")
        facts = dict(json.loads(text)) if is_whole else {}
    except (OSError, ValueError, TypeError, RecursionError):
        is_whole, facts = False, {}
    if not is_whole:
        raise UserError(f"{path} is not what was written: it is damaged")
    if facts.pop("format", None) != FORMAT:
        raise UserError(f"{path} has a format that this zoft does not read: use the version of zoft that wrote it")
    files = facts.pop("files", None)
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise UserError(f"{path} does not say which files there are: it was not written by zoft")
    return facts, files


def _is_entry(said: Any) -> bool:
    return isinstance(said, dict) and isinstance(said.get("size"), int) and isinstance(said.get("sha256"), str)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
