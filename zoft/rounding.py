"""Writing a float32 result into fewer bits: to nearest, or up or down at random so that the mean is right.

An update smaller than half a unit in the last place is lost when it is rounded to nearest: in bfloat16, 1,000 updates
of rms 1e-6 move weights of size 0.02 by 1 % of what was meant. Stochastic rounding moves each weight rarely and by a
whole unit, and the sum by what was meant. Its bits come from the counter generator, so a run repeats bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoft.lazy import torch
from zoft.noise import random_words

if TYPE_CHECKING:
    from torch import Tensor

ROUNDINGS = ("auto", "stochastic", "nearest")


def round_stochastically(values: Tensor, dtype: torch.dtype, key: int, start: int) -> Tensor:
    """Round to a neighbour in ``dtype``, the nearer one with the larger probability: E[result] = value.

    Args:
        values: float32, flat; finite.
        dtype: bfloat16 or float16.
        key: 64-bit stream key.
        start: flat index of the first value in its tensor: the bits are those of that element.

    Returns:
        A tensor of ``dtype``; values that ``dtype`` represents are returned as they are.

    Example:
        >>> import torch
        >>> ones = torch.full((10_000,), 1.0 + 2**-9)
        >>> bool(abs(round_stochastically(ones, torch.bfloat16, 1, 0).float().mean() - ones[0]) < 1e-4)
        True

    References: Gupta et al. 2015, section 3.
    """
    words = random_words(key, start, start + values.numel(), values.device)
    dropped = 16 if dtype == torch.bfloat16 else 13  # mantissa bits of float32 that do not fit
    mask = (1 << dropped) - 1
    # A random number below one unit is added to the magnitude's bits; cutting them off then rounds up that often.
    rounded = values.view(torch.int32).add(words & mask).bitwise_and_(~mask).view(torch.float32)
    if dtype == torch.float16:
        rounded = torch.where(values.abs() < 2.0**-14, _subnormal(values, words), rounded)
    return rounded.to(dtype)


def _subnormal(values: Tensor, words: Tensor) -> Tensor:
    """float16 below 2^-14 is spaced evenly, 2^-24 apart."""
    uniform = (words.bitwise_and(0xFFFFFF)).to(torch.float32) * 2.0**-24
    rounded = (values * 2.0**24 + uniform).floor() * 2.0**-24
    return torch.copysign(rounded, values)  # keeps the sign of a zero
