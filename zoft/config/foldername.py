"""The name of a run's folder, from its settings: different runs have different folders without anyone naming them."""

from __future__ import annotations

import os
import re
import zlib

from zoft.config.experiments import is_path
from zoft.utils import own_files

# in the name already, or no part of what is run
_UNTOLD = {"config", "seed", "output_dir", "launcher", "tracker", "diagnostics"}
_LONGEST = 64  # characters of a folder's name beyond the experiment's; what is longer nobody reads


def named_after(arguments: list[str], keys: list[str], *, exactly: bool = False) -> str:
    """A folder's name from the arguments that tell it from its neighbours, the same for every order of arguments.

    Args:
        arguments: of the run, ``key=value``.
        keys: those that belong in the name, sorted.
        exactly: whether signs that a folder's name has not count too, in a hash.

    Example:
        >>> named_after(["config=a/b.yaml", "seed=1", "model.name=facebook/opt-125m"], ["config", "model.name"])
        'config=b,model.name=facebook-opt-125m'
    """
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    parts = []
    for key in keys:
        value = values[key].strip("'")
        if key == "config" and is_path(value):
            value = os.path.splitext(os.path.basename(value))[0]
        if own_files.split(value):
            value = os.path.basename(value)
        readable = re.sub(r"[^\w.+-]+", "-", value).strip("-")
        parts.append(f"{key.lstrip('+')}={readable}")
    name = re.sub(r"[^\w.=,+-]+", "-", ",".join(parts)).strip("-")
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9]}-{zlib.crc32(name.encode()):08x}"
    written = repr([values[key].strip("'\"") for key in keys])
    return f"{name}-{zlib.crc32(written.encode()):08x}" if exactly else name


def suffix(arguments: list[str]) -> str:
    """What the default folder's name gains from the arguments beyond the experiment and the seed.

    Example:
        >>> suffix(["config=quickstart", "seed=3"]), suffix(["config=quickstart", "estimator.eps=1e-2"])
        ('', '-estimator.eps=1e-2')
    """
    keys = sorted({argument.split("=", 1)[0] for argument in arguments if "=" in argument})
    name = named_after(arguments, [key for key in keys if key.split(".")[0] not in _UNTOLD])
    return f"-{name}" if name else ""
