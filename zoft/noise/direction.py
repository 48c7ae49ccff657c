"""A direction by its numbers, and the key of the random stream that gives its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Direction:
    """The name of one random direction; z itself is made when and where it is needed.

    Args:
        seed: the run's seed, or a given step seed (``direction_seeds``).
        step: optimisation step, from 0.
        index: index of the direction within the step, from 0.
        example: index of the example this direction is for, where each has its own (zoft/noise/joint.py); None for all.
        mix: where given, the direction is the sum of these directions times their factors.
    """

    seed: int
    step: int
    index: int = 0
    example: int | None = None
    mix: tuple[tuple[Direction, float], ...] = ()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Direction:
        """The direction that `dataclasses.asdict` made this of; earlier releases named its index ``probe``.

        Example:
            >>> Direction.from_dict({"seed": 0, "step": 3, "probe": 2})
            Direction(seed=0, step=3, index=2, example=None, mix=())
        """
        # what was written under an earlier name is read for as long as its runs are resumed
        named = {"index" if key == "probe" else key: value for key, value in saved.items()}
        mix = tuple((cls.from_dict(one), factor) for one, factor in named.pop("mix", ()))
        return cls(**named, mix=mix)


def key_of(direction: Direction, name: str, role: str = "z") -> int:
    """A 64-bit key for one tensor's stream: independent for every seed, step, index, name and role.

    Example:
        >>> key_of(Direction(0, 1), "a") != key_of(Direction(0, 1), "b")
        True
    """
    # a hash of the words: no arithmetic of seeds, in which neighbours would collide
    text = f"{direction.seed}|{direction.step}|{direction.index}|{role}|{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def step_seed(run_seed: int, step: int) -> int:
    """A 31-bit seed for the step's own generator, for sources that are seeded rather than keyed."""
    # 31 bits: what torch and numpy both take as a seed
    return key_of(Direction(run_seed, step), "", role="step_seed") & 0x7FFFFFFF
