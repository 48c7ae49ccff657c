"""Python files of a user's own, named as ``./my_file.py:Name``: imported once, with a hash of what was imported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import types
from functools import lru_cache
from pathlib import Path

from zoft.errors import UserError
from zoft.utils.files import at_home

_CHOICE = re.compile(r"(?P<path>.+\.py):(?P<name>\w*)", re.S)


def split(text: object) -> tuple[str, str] | None:
    """(path, name) of a choice that names a file, else None.

    Example:
        >>> split("./my_est.py:Wide"), split("central")
        (('./my_est.py', 'Wide'), None)
    """
    match = _CHOICE.fullmatch(text) if isinstance(text, str) else None
    return None if match is None else (match["path"], match["name"])


def absolute(text: str) -> str:
    """The same choice from wherever it is read."""
    path, _, name = text.rpartition(":")
    return f"{at_home(path).resolve()}:{name}"


def module_of(path: str, where: str) -> tuple[types.ModuleType, str]:
    """The file as a module, and the SHA-256 of its bytes; its folder is searched for what it imports.

    Raises:
        UserError: it is not there, or Python cannot import it.
    """
    file = at_home(path).resolve()
    if not file.is_file():
        raise UserError(f"{where}: there is no file {path}; give FILE.py:Name")
    sha = digest(str(file))
    try:
        return _imported(str(file), sha), sha
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def digest(path: str) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache
def _imported(file: str, sha: str) -> types.ModuleType:
    name = f"zoft_own_{Path(file).stem}_{sha[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up
    sys.path.insert(0, os.path.dirname(file))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{file}{_line_in(error, file)} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.path.dirname(file))
    return module


def _line_in(error: Exception, file: str) -> str:
    """Where in the file it went wrong, as ``, line 7``."""
    lines = [error.lineno] if isinstance(error, SyntaxError) else []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
