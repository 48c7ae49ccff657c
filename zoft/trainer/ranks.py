"""The processes of a run are one program: same code and settings, and weights that are sent where they differ."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoft.errors import UserError
from zoft.lm.models.quantized import stored_parts
from zoft.version import __version__
from zoft.weights.mapped import release
from zoft.weights.tensors import bits_of

log = logging.getLogger(__name__)
_PACKAGES = ("torch", "transformers", "numpy")  # what numbers are computed by


def require_same(facts: Mapping[str, str]) -> None:
    """Refuse processes that would not take the same steps; all processes come here, and all of them raise.

    Args:
        facts: what has to be equal -> its text, e.g. ``{"config": "seed: 0"}``; the code and the versions of the
            packages that numbers are computed by are compared too. Hashes are exchanged, and texts where they differ.

    Raises:
        UserError: naming the process and the first line that differs.
    """
    facts = {**facts, "code": code()}
    digests = gather({name: hashlib.sha256(text.encode()).hexdigest() for name, text in facts.items()})
    name = next((name for name in facts if any(other[name] != digests[0][name] for other in digests)), None)
    if name is None:
        return
    first, *others = gather(facts[name])
    rank, text = next((rank, text) for rank, text in enumerate(others, 1) if text != first)
    lines = zip_longest(text.splitlines(), first.splitlines(), fillvalue="nothing")
    line, first_line = next((pair for pair in lines if pair[0] != pair[1]), ("", ""))
    mend = "install the same versions everywhere" if name == "code" else "start every process with the same arguments"
    raise UserError(
        f"process {rank} has other {name} than process 0 ({line.strip()}; there {first_line.strip()}): {mend}"
    )


@lru_cache
def code() -> str:
    """A line for zoft, with the SHA-256 of its Python files, and one for every package that numbers are computed by."""
    root, sha = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        sha.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    lines = [f"zoft {__version__}, files {sha.hexdigest()[:16]}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a build of one's own
            lines.append(f"{package} without a version")
    return "\n".join(lines)


def share_weights(model: nn.Module) -> int:
    """Give all processes the first one's tensors; what they all have already is not sent.

    Each process hashes what it holds (SHA-256 of every parameter's stored parts and every buffer), the hashes are
    exchanged (tens of bytes a tensor), and a tensor is broadcast where one of them is another.

    Args:
        model: parameters on the meta device are left out.

    Returns:
        Bytes that every other process has received.

    Raises:
        UserError: a process has tensors of other shapes or dtypes: another model.

    Note:
        The tensors are written in place.
    """
    parts = [part for part in _parts(model) if not part.is_meta]
    stored = [(str(part.dtype), tuple(part.shape), _digest(part)) for part in parts]
    everyone = gather(stored)
    layouts = [[(dtype, shape) for dtype, shape, _ in tensors] for tensors in everyone]
    other = next((rank for rank, layout in enumerate(layouts) if layout != layouts[0]), None)
    if other is not None:
        raise UserError(
            f"process {other} has another model than process 0 (tensors of other shapes or dtypes): start every "
            "process with the same model"
        )
    differing = [part for part, hashes in zip(parts, zip(*everyone, strict=True), strict=True) if len(set(hashes)) > 1]
    with torch.no_grad():
        for part in differing:
            torch.distributed.broadcast(part.data, src=0)
    sent = sum(part.numel() * part.element_size() for part in differing)
    if sent:
        log.info("%d of %d tensors differed between processes: %d bytes were sent", len(differing), len(parts), sent)
    return sent


def _parts(model: nn.Module) -> Iterable[Tensor]:
    for parameter in model.parameters():
        yield from stored_parts(parameter)
    yield from model.buffers()


def _digest(tensor: Tensor) -> bytes:
    sha = hashlib.sha256(bits_of(tensor))
    release(tensor)  # what rests in a file need not stay in memory for having been looked at
    return sha.digest()


def gather(value: Any, group: Any = None) -> list[Any]:
    """The value of every process (of a group), by rank; all of them come here. Tensors may differ in size."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
