"""Whether the noise of a device is compiled: what the user asks for, what is worth it, and what works."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zoft.errors import UserError
from zoft.noise.kernels.base import Kernels
from zoft.utils.lazy import torch

log = logging.getLogger(__name__)

MODES = ("auto", "always", "never")
"""What the environment variable ZOFT_COMPILE may say."""

# Trained elements from which a hundred steps pay for the compiler. CPU, measured: building takes 0.5 s of one core,
# once a machine (a built library loads in milliseconds and always pays), and a step of a pair saves 5 ns an element.
# CUDA: Triton compiles for 0.6 to 1.5 s a kind of kernel once a machine (measured on a CPU; a run uses a handful). What
# a step saves is estimated, not measured: some 0.1 s of launches (40 a tensor and pass, of which one is left) and 0.1
# to 0.5 ns of memory traffic an element.
WORTH_BUILDING = {"cpu": 1 << 20, "cuda": 1 << 22}

ACTIVE: dict[str, Kernels] = {}
"""Kind of device -> the compiled noise in use there; eager code where there is none."""

_why: dict[str, str] = {}
_broken: set[str] = set()


def why(device: torch.device | str) -> str:
    """Why the noise of a device is compiled or eager, in a few words."""
    return _why.get(torch.device(device).type, "not asked for")


def prepare(num_elements: int, device: torch.device, agrees: Callable[[Kernels], bool]) -> str:
    """Compile the noise of a device where that pays; see :func:`zoft.noise.source.prepare`.

    Args:
        num_elements: how many weights are trained there.
        device: where.
        agrees: whether kernels give the bits of the eager code there.
    """
    mode, kind = os.environ.get("ZOFT_COMPILE", "auto") or "auto", device.type
    if mode not in MODES:
        raise UserError(f"ZOFT_COMPILE must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "never":
        ACTIVE.pop(kind, None)
        _why[kind] = "ZOFT_COMPILE=never"
    elif kind not in WORTH_BUILDING:
        _why[kind] = f"there is no compiled noise for {kind}"
    elif kind not in ACTIVE and kind not in _broken:
        if mode == "always" or num_elements >= WORTH_BUILDING[kind] or _is_built(kind):
            _activate(device, agrees)
        else:
            _why[kind] = f"{num_elements:,} elements: fewer than pay for compiling (ZOFT_COMPILE=always does)"
    return "compiled" if kind in ACTIVE else "eager"


@contextmanager
def using(device: torch.device | str, chosen: Kernels | None) -> Iterator[None]:
    """These kernels, or with None the eager code, on a device for a while: for measuring one against the other."""
    kind = torch.device(device).type
    before = ACTIVE.pop(kind, None)
    try:
        if chosen is not None:
            ACTIVE[kind] = chosen
        yield
    finally:
        ACTIVE.pop(kind, None)
        if before is not None:
            ACTIVE[kind] = before


def _is_built(kind: str) -> bool:
    from zoft.noise.kernels import cpu

    return kind == "cpu" and cpu.library().exists()


def _activate(device: torch.device, agrees: Callable[[Kernels], bool]) -> None:
    from zoft.noise.kernels import cpu, cuda  # here and not above: `--help` reads this file too, and needs neither

    kind = device.type
    try:
        loaded: Kernels = cpu.load() if kind == "cpu" else cuda.load()
        if not agrees(loaded):
            raise RuntimeError(f"what {loaded.about} made of it gives other numbers than the eager code")
    except Exception as error:  # whatever a compiler does, the run goes on without it
        _broken.add(kind)
        _why[kind] = str(error).split("\n")[0]
        log.warning("the noise on %s is not compiled, training is slower by some of it: %s", kind, _why[kind])
    else:
        ACTIVE[kind], _why[kind] = loaded, loaded.about
