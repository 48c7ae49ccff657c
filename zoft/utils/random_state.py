"""The global random states of Python, numpy and torch, put back, written down and read again; a text's own one."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Put the global torch, CUDA, numpy and Python random states back at the end of the block.

    The Trainer seeds all of them; its caller finds its own as they were.

    Example:
        >>> before = torch.get_rng_state()
        >>> with global_random_state_kept():
        ...     _ = torch.manual_seed(1)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    python, array, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def random_state() -> dict[str, Any]:
    """The global random states as plain values, which JSON can hold."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = [bytes(one.tolist()).hex() for one in torch.cuda.get_rng_state_all()]
    return states


def put_random_state(saved: dict[str, Any]) -> None:
    """Put the global random states back."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(saved["torch"]))
    if torch.cuda.is_available() and len(saved.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(one) for one in saved["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def prompt_generator(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """Random numbers of a prompt's samples: the same in every batch and at every point."""
    # 56 bits of a hash of seed and prompt
    digest = hashlib.blake2b(f"{seed}:{','.join(map(str, prompt))}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
