"""Numbers of few bits: how a float32 update is written into them, and how a loss is kept out of them.

An update smaller than half a unit in the last place is lost when it is rounded to nearest: in bfloat16, 1,000 updates
of rms 1e-6 move weights of size 0.02 by 1 % of what was meant. Stochastic rounding moves each weight rarely and by a
whole unit, and the sum by what was meant; its bits come from the counter generator, so a run repeats bit for bit. A
master is the weight in float32: it takes the updates, and the weight is the master rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

from zoft.noise.counter import random_words
from zoft.noise.direction import Direction, key_of
from zoft.utils.lazy import Tensor, torch

ROUNDINGS = ("auto", "stochastic", "master", "nearest")
"""What ``precision.update`` can be."""

SMALL = 1 << 16
"""Elements up to which ``auto`` keeps a master of any tensor: 256 KiB each."""


@dataclass(frozen=True)
class Rounding:
    """How the updates of a run are written into its bfloat16 and float16 tensors; wider ones need nothing.

    Args:
        update: one of :data:`ROUNDINGS`; ``auto`` keeps a master of every vector (norms, biases) and of every tensor of
            at most :data:`SMALL` elements, and rounds the others stochastically.
        seed: of the random bits: the run's.
    """

    update: str = "nearest"
    seed: int = 0

    @classmethod
    def chosen(cls, update: str, seed: int, noise: str) -> Rounding:
        """As ``precision.update`` says; ``auto`` is ``nearest`` for MeZO's own numbers, as in its published code."""
        return cls("nearest" if update == "auto" and noise == "torch_sequential" else update, seed)

    def way(self, tensor: Tensor) -> str:
        """``stochastic``, ``master`` or ``nearest``, for this tensor.

        Example:
            >>> bias, matrix = (torch.zeros(shape, dtype=torch.bfloat16) for shape in (8, (512, 512)))
            >>> Rounding("auto").way(bias), Rounding("auto").way(matrix), Rounding("auto").way(matrix.float())
            ('master', 'stochastic', 'nearest')
        """
        if not has_few_bits(tensor):
            return "nearest"
        if self.update != "auto":
            return self.update
        return "master" if tensor.dim() < 2 or tensor.numel() <= SMALL else "stochastic"

    def sums(self, tensor: Tensor, num_coordinates: int) -> bool:
        """Whether the steps are summed in coordinates, :func:`round_sum`: ``auto`` does where those are fewer."""
        return self.update == "auto" and self.way(tensor) == "stochastic" and num_coordinates < tensor.numel()

    def key(self, update: int, name: str, role: str = "rounding") -> int:
        """The stream of random bits for the update of this number of tensor ``name``."""
        return key_of(Direction(self.seed, update), name, role=role)


def has_few_bits(tensor: Tensor) -> bool:
    """Whether a tensor is bfloat16 or float16."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def follow_(master: Tensor, weight: Tensor) -> Tensor:
    """weight != round(master): changed outside of training; the master is reset to the weight there.

    Element by element and bit by bit, so that it does not matter in which pieces this is done.

    Args:
        master: float32, flat; overwritten.
        weight: bfloat16 or float16, flat.
    """
    is_rounded = master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
    return master.copy_(torch.where(is_rounded, master, weight.to(torch.float32)))


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


def round_sum(weight: Tensor, before: Tensor, after: Tensor, key: int, start: int) -> Tensor:
    """The step by which a weight follows a sum of steps that is known in float32, from ``before`` to ``after``.

    Rounding each step by itself takes a new random number each time, and the errors add up. Here the sum is rounded,
    always with the same random number: the weight has moved by round(sum) at any time, and what is merged into it when
    the sum begins anew has been rounded once. The sum itself need not be stored in the tensor's size: it is a product
    of the coordinates' sum and their basis.

    Args:
        weight: bfloat16 or float16, flat: where its numbers lie, before the step.
        before: float32, flat: the sum that the weight has followed so far; may be overwritten.
        after: float32, flat: the sum that it is to follow; may be overwritten.
        key: 64-bit stream key, the same for as long as the sum is.
        start: flat index of the first weight in its tensor.

    Returns:
        float32: multiples of the weight's unit in the last place, E[result] = after - before.

    Example:
        >>> weight, sums = torch.ones(10_000).bfloat16(), [torch.full((10_000,), 1e-5 * k) for k in range(101)]
        >>> steps = [round_sum(weight, a.clone(), b.clone(), 1, 0) for a, b in zip(sums, sums[1:])]
        >>> moved = sum(steps)
        >>> bool((moved > 0).float().mean() < 0.15) and bool(abs(moved.mean() - 1e-3) < 1e-4)
        True
    """
    digits, lowest = (7, 34) if weight.dtype == torch.bfloat16 else (10, 113)  # smallest unit: 2^-100, 2^-24
    exponent = weight.to(torch.float32).view(torch.int32).bitwise_and_(0x7F800000).clamp_min_(lowest << 23)
    unit = exponent.sub_(digits << 23).view(torch.float32)
    words = random_words(key, start, start + weight.numel(), weight.device)
    uniform = words.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2.0**-24)
    rounded = after.div_(unit).add_(uniform).floor_()
    return rounded.sub_(before.div_(unit).add_(uniform).floor_()).mul_(unit)


def _subnormal(values: Tensor, words: Tensor) -> Tensor:
    """float16 below 2^-14 is spaced evenly, 2^-24 apart."""
    uniform = (words.bitwise_and(0xFFFFFF)).to(torch.float32) * 2.0**-24
    rounded = (values * 2.0**24 + uniform).floor() * 2.0**-24
    return torch.copysign(rounded, values)  # keeps the sign of a zero


@dataclass
class Sum:
    """The steps that a tensor of few bits has taken in one basis, added up in coordinates.

    Args:
        total: float32, of the coordinates' shape: learning rate times update, summed.
        first: the number of the first of these updates; it names the random bits.
        direction: one of the last of these steps: it says which basis.
    """

    total: Tensor
    first: int
    direction: Direction

    def add_(self, start: int, stop: int, update: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Add a step to the coordinates [start, stop): the sum there before and after."""
        total = self.total.view(-1)[start:stop]
        before = total.clone()
        return before, total.add_(update, alpha=lr).clone()
