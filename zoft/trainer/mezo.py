"""MeZO's published draws from numpy's and torch's global generators: step seeds and the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch.utils.data import Sampler


def step_seeds(seed: int, count: int) -> list[int]:
    """The seed of each step's z: numpy's global generator after ``set_seed``.

    Args:
        seed: the run's (42 in the recorded run).
        count: steps; a longer run begins with the same ones.

    Example:
        >>> step_seeds(42, 3)
        [534895718, 199900595, 862061404]
    """
    return [int(drawn) for drawn in numpy.random.RandomState(seed).randint(10**9, size=count)]


class MezoRowOrder(Sampler[int]):
    """The rows as the Trainer of transformers 4.28 shuffles them, pass by pass.

    Its sampler is seeded with a number of 64 bits, which it draws from torch's global generator after ``set_seed``; of
    each pass one more permutation is drawn than is used.

    Example:
        >>> order = MezoRowOrder(64, 42)
        >>> list(order)[:4]
        [24, 2, 6, 19]
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        first = torch.Generator().manual_seed(seed)
        self.num_rows = num_rows
        # 64 bits of torch's global generator, drawn right after set_seed: what that Trainer seeds its sampler with
        self.seed = int(torch.empty((), dtype=torch.int64).random_(generator=first))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to a pass; the data loader says which."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        # of each pass one permutation more is drawn than is used
        for _ in range(2 * self.epoch):
            torch.randperm(self.num_rows, generator=generator)
        return iter(torch.randperm(self.num_rows, generator=generator).tolist())


def decays(name: str) -> bool:
    """Whether a parameter decays: MeZO goes by these words alone, so that Llama's ``model.norm.weight`` does."""
    return not any(word in name for word in ("bias", "layer_norm", "layernorm"))
