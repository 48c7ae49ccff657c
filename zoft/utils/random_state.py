"""The global random states, kept: the Trainer seeds torch, numpy and Python, and whoever called it gets theirs back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Put the global torch, CUDA, numpy and Python random states back at the end of the block.

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
