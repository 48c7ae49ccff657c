"""A run's folder: claimed before anything is loaded, resumed by the same command, never overwritten."""

from __future__ import annotations

import difflib
from pathlib import Path

from zoft import atomic
from zoft.errors import UserError

CONFIG, REPORT = "config.yaml", "report.json"
_IGNORED = {".hydra", "multirun.yaml", ".submitit"}


def claim(output_dir: str, resolved: str) -> str:
    """Decide what a run may do with its folder, and put its resolved config there.

    Args:
        output_dir: the folder.
        resolved: the text of the run's config.yaml.

    Returns:
        ``new`` (the folder was empty or absent), ``resume`` (it holds this very run, unfinished) or ``done``.

    Raises:
        UserError: not writable, holding another run (the differing lines are shown), or holding something else.
    """
    folder = Path(output_dir)
    held = {path.name for path in folder.iterdir()} - _IGNORED if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={output_dir} is a file: give a folder")
    if held and CONFIG not in held:
        shown = ", ".join(sorted(held)[:3])
        raise UserError(
            f"output_dir={output_dir} is not empty and holds no run of zoft ({shown}): choose another folder"
        )
    if CONFIG in held:
        earlier = (folder / CONFIG).read_text(encoding="utf-8")
        if earlier != resolved:
            raise UserError(
                f"output_dir={output_dir} holds another run; it differs in\n{_difference(earlier, resolved)}\n"
                "choose another output_dir, or repeat that run's command to resume it"
            )
        return "done" if REPORT in held else "resume"
    _write(folder, output_dir, resolved)
    return "new"


def nearest(output_dir: str) -> Path:
    """The folder itself where it exists, else the nearest one above it that does."""
    folder = Path(output_dir)
    return next(path for path in (folder, *folder.parents) if path.exists() or path == path.parent)


def release(output_dir: str, there: Path) -> None:
    """Take back a claim on a folder in which nothing has happened yet, so that a failed start leaves nothing behind.

    Args:
        output_dir: the folder that was claimed.
        there: what :func:`nearest` said before the claim: it and what is above it was not made by the claim.
    """
    folder = Path(output_dir)
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG}:
        (folder / CONFIG).unlink(missing_ok=True)
        while folder != there and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _write(folder: Path, output_dir: str, resolved: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / CONFIG, resolved)
    except OSError as error:
        raise UserError(f"output_dir={output_dir} is not writable ({error.strerror}): choose another folder") from None


def _difference(earlier: str, now: str) -> str:
    lines = difflib.unified_diff(earlier.splitlines(), now.splitlines(), "there", "now", n=0, lineterm="")
    return "\n".join(f"  {line}" for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---")))
