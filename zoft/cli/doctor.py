"""`zoft doctor`: whether this installation works, and how fast its noise is."""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.utils.lazy import torch
from zoft.utils.terminal import fitted

PACKAGES = ("transformers", "datasets", "peft", "accelerate", "hydra-core")
"""What zoft cannot do without, besides torch."""

_GB = 1e9
_PYTHON = (3, 11)
_ELEMENTS = 1 << 20  # of the noise that is timed: 4 MB, as a chunk of an update
_SECONDS = 0.3  # for one law


@dataclass
class Check:
    """One line: what, how it is, and the same for machines.

    Args:
        name: what is checked.
        state: ``ok``, ``failed`` (zoft does not work without) or ``note`` (works, could be better).
        text: how it is.
        values: figures for ``--json``.
    """

    name: str
    state: str
    text: str
    values: dict[str, Any] = field(default_factory=dict)


def command(arguments: list[str]) -> int:
    """Print every check as it is made.

    Returns:
        0 where nothing failed, else 1.
    """
    for argument in arguments:
        if argument != "--json":
            raise UserError(f"zoft doctor knows no {argument!r}.{did_you_mean(argument, ['--json'])}")
    done = []
    for check in checks():
        done.append(check)
        if not arguments:
            print(fitted(line(check)), flush=True)
    failed = [check.name for check in done if check.state == "failed"]
    if arguments:
        print(json.dumps({"ok": not failed, "checks": [vars(check) for check in done]}, indent=2))
    else:
        print(f"\nNot well: {', '.join(failed)}." if failed else "\nAll is well.")
    return 1 if failed else 0


def line(check: Check) -> str:
    """A check as a line of the table."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    sign = dict(zip(("ok", "failed", "note"), "✓✗–" if unicode else "+x-", strict=True))[check.state]
    return f"  {sign} {check.name:<18}  {check.text}"


def checks() -> Iterator[Check]:
    """Every check, in the order of the table."""
    yield python()
    torch_ = package("torch")
    if torch_.state == "ok":
        torch_ = _torch(torch_)
    yield torch_
    for name in PACKAGES:
        yield package(name)
    if torch_.state == "ok":
        for device in _devices():
            yield from noise(device)
    yield from _room()


def python() -> Check:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info < _PYTHON:
        return Check("python", "failed", f"{version}: zoft needs {'.'.join(map(str, _PYTHON))} or newer")
    return Check("python", "ok", f"{version}, {platform.system()} {platform.machine()}", {"version": version})


def package(name: str) -> Check:
    """An installed package, and whether its version is one that zoft asks for."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "failed", f"not installed: pip install {name}")
    wanted = _wanted(name)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Check(name, "failed", f"{version}: zoft asks for {name}{wanted}", {"version": version})
    return Check(name, "ok", version, {"version": version})


def noise(device: torch.device) -> Iterator[Check]:
    """Whether a device's noise is compiled, whether that gives the same bits, and what an element of each law takes."""
    from zoft.noise import counter, kernels
    from zoft.noise import source as noise_

    log = logging.getLogger("zoft.noise.kernels")
    level = log.level
    log.setLevel(logging.ERROR)  # the line below says what the warning would
    try:
        how = noise_.prepare(sys.maxsize, device)  # as for the largest run
    finally:
        log.setLevel(level)
    title, why = f"noise on {device.type}", kernels.why(device)
    state = "ok" if how == "compiled" or os.environ.get("ZOFT_COMPILE") == "never" else "note"
    yield Check(title, state, f"{how}: {why}", {"how": how, "why": why})
    compiled = counter.compiled_on(device)
    if compiled:
        same = noise_.agrees(compiled, device, thorough=device.type == "cpu")
        text = "compiled and eager agree" if same else "compiled and eager noise differ: set ZOFT_COMPILE=never"
        yield Check("  same bits", "ok" if same else "failed", text, {"same": same})
    for law in noise_.LAWS[:2]:
        taken = _nanoseconds(law, device)
        text = f"{taken:.2f} ns per element{' on one core' if device.type == 'cpu' else ''}, made and added"
        yield Check(f"  {law}", "ok", text, {"nanoseconds_per_element": taken, "how": how})


def _torch(check: Check) -> Check:
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever it likes
        return Check("torch", "failed", f"cannot be imported: {error}".split("\n")[0])
    gpus = []
    if torch.cuda.is_available():
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        gpus = [f"{gpu.name} ({gpu.total_memory / _GB:.0f} GB)" for gpu in properties]
    threads = torch.get_num_threads()
    text = f"{check.text}, {threads} thread{'s'[: threads > 1]}, {', '.join(gpus) or 'no CUDA device'}"
    return Check("torch", "ok", text, {**check.values, "threads": threads, "cuda_devices": gpus})


def _devices() -> list[torch.device]:
    import torch

    return [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]


def _nanoseconds(law: str, device: torch.device) -> float:
    import torch

    from zoft.noise.direction import Direction
    from zoft.noise.source import CounterNoise

    source, out = CounterNoise(law, {"w": _ELEMENTS}), torch.zeros(_ELEMENTS, device=device)

    def add() -> None:
        source.add_(out, Direction(0, 0), "w", 0, 1e-3)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if device.type != "cpu":
        return _seconds(add, time.perf_counter) / _ELEMENTS * 1e9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the time of several would be that of whatever else the machine is doing
    try:
        return _seconds(add, time.process_time) / _ELEMENTS * 1e9
    finally:
        torch.set_num_threads(threads)


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """The median of many times, by ``clock``."""
    work()  # the first one pays for tables
    taken: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while not taken or time.perf_counter() < stop:
        begin = clock()
        work()
        taken.append(clock() - begin)
    return statistics.median(taken)


def _room() -> Iterator[Check]:
    from zoft.utils.files import cache_dir

    folder = cache_dir()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    values = {"folder": str(folder), "writable": writable}
    text = f"{_short(folder)}, {'writable' if writable else 'cannot be written: set ZOFT_CACHE to another folder'}"
    yield Check("cache", "ok" if writable else "failed", text, values)
    disk = shutil.disk_usage(existing)
    state = "ok" if disk.free > _GB else "note"
    yield Check("disk", state, f"{disk.free / _GB:.1f} GB free for the cache", {"free_bytes": disk.free})
    try:
        memory = importlib.import_module("psutil").virtual_memory()
    except Exception:  # accelerate brings it; not a reason to stop
        return
    text = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB available"
    yield Check("memory", "ok", text, {"available_bytes": memory.available, "total_bytes": memory.total})


def _short(folder: Path) -> str:
    try:
        return str("~" / folder.relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere, or nobody has a home
        return str(folder)


def _wanted(name: str) -> Any:
    """The versions of a package that zoft's own metadata asks for; None where zoft is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("zoft") or []
    except metadata.PackageNotFoundError:
        return None
    requirements = (requirement for requirement in map(Requirement, lines) if requirement.name == name)
    return next((requirement.specifier for requirement in requirements if requirement.marker is None), None)
