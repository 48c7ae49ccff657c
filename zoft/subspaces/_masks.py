"""Which elements of a tensor move, one bit each: made by size, by chance, or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.noise.counter import random_words
from zoft.utils.lazy import Tensor, torch

_PIECE = 1 << 20  # elements looked at at a time, a multiple of 8: bounds the temporaries


@dataclass(frozen=True)
class Mask:
    """One bit an element, 1 where it moves.

    Args:
        bits: uint8, eight elements each, the first in the lowest bit.
        count: how many of them are 1.

    Example:
        >>> import torch
        >>> mask = Mask.of(torch.tensor([True, False, True]))
        >>> mask.count, mask.piece(1, 3).tolist(), mask.at(torch.tensor([[2, 1]])).tolist()
        (2, [0, 1], [[1, 0]])
    """

    bits: Tensor
    count: int

    @classmethod
    def of(cls, moves: Tensor) -> Mask:
        """From booleans, flat."""
        return cls.from_ranges(moves.numel(), lambda start, stop: moves[start:stop])

    @classmethod
    def from_ranges(cls, size: int, moves: Callable[[int, int], Tensor]) -> Mask:
        """From what says of a range [start, stop) of elements which of them move: booleans, flat."""
        packed, count = [], 0
        for start, stop in _pieces(size):
            piece = moves(start, stop)
            count += int(piece.sum())
            # padded to whole octets: the last ones say nothing and are cut off in piece()
            bits = torch.nn.functional.pad(piece.to(torch.uint8), (0, -piece.numel() % 8)).view(-1, 8)
            packed.append((bits << _shifts(str(bits.device))).sum(1, dtype=torch.uint8))
        return cls(torch.cat(packed) if packed else torch.zeros(0, dtype=torch.uint8), count)

    def piece(self, start: int, stop: int) -> Tensor:
        """0 or 1 for the elements [start, stop), uint8."""
        # the octets that hold [start, stop), then their bits, then the wanted ones of these
        octets = self.bits[start // 8 : -(-stop // 8)].unsqueeze(1)
        return ((octets >> _shifts(str(octets.device))) & 1).view(-1)[start % 8 : start % 8 + stop - start]

    def at(self, places: Tensor) -> Tensor:
        """0 or 1 for elements at any flat places, uint8, of the shape of ``places``."""
        # octet number = place / 8, bit in it = place mod 8
        return (self.bits[places >> 3] >> (places & 7).to(torch.uint8)) & 1


def smallest(weight: Tensor, count: int) -> Mask:
    """The ``count`` elements of least absolute value, and those that are as small as the largest of them.

    The threshold is found bit by bit, in two passes over pieces: nothing is sorted or copied, and every device finds
    the same. (Without its sign, a float32 is in the order of its bits.)

    Example:
        >>> import torch
        >>> smallest(torch.tensor([-3.0, 0.5, -1.0, 2.0, 1.0]), 2).piece(0, 5).tolist()
        [0, 1, 1, 0, 1]
    """
    flat = weight.view(-1)

    def patterns(start: int, stop: int) -> Tensor:
        return flat[start:stop].to(torch.float32).abs().view(torch.int32)

    # 2^15 values of the upper half (no sign), then 2^16 of the lower: two histograms instead of a sort
    high, before = _bin_of(count, (patterns(*piece) >> 16 for piece in _pieces(flat.numel())), 1 << 15)
    lower = (p[p >> 16 == high] & 0xFFFF for p in (patterns(*piece) for piece in _pieces(flat.numel())))
    low, _ = _bin_of(count - before, lower, 1 << 16)
    # |theta_ij| <= h, with h the bits of the count-th smallest
    return Mask.from_ranges(flat.numel(), lambda start, stop: patterns(start, stop) <= (high << 16 | low))


def by_chance(key: int, size: int, keep: float, device: torch.device) -> Mask:
    """Every element with probability ``keep``, by the counter's bits: the same on every device."""
    # a word is uniform over 2^32 values: it is at most `last` with probability keep
    last = max(1, round(keep * 2**32)) - 1 - 2**31  # of the 2^32 values of a word, as int32, those up to this one
    return Mask.from_ranges(size, lambda start, stop: random_words(key, start, stop, device) <= last)


def read(path: str, tensors: dict[str, Any]) -> dict[str, Mask]:
    """The masks in a file.

    Args:
        path: a .safetensors file: name -> bool or uint8 of the tensor's shape, or int64 flat indices of what moves.
        tensors: what is trained, by name.

    Raises:
        UserError: no such file, or one that does not fit the model.
    """
    masks = {}
    for name, value in _opened(path).items():
        where = f"subspace.mask={path}"
        if name not in tensors:
            raise UserError(f"{where} has a mask for {name}, which is not trained.{did_you_mean(name, tensors)}")
        tensor = tensors[name]
        if value.dtype == torch.int64 and value.dim() == 1:
            if value.numel() and (int(value.min()) < 0 or int(value.max()) >= tensor.numel()):
                # indices are checked: one outside would be taken for another element, or fail without a name
                raise UserError(f"{where}: an index for {name} is outside of its {tensor.numel()} elements")
            moves = torch.zeros(tensor.numel(), dtype=torch.bool)
            moves[value] = True
        elif value.dtype in (torch.bool, torch.uint8) and value.shape == tensor.shape:
            moves = value.view(-1) != 0
        else:
            raise UserError(
                f"{where}: the mask of {name} must be bool or uint8 of shape {list(tensor.shape)}, or one row of int64 "
                f"flat indices, got {str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
            )
        mask = Mask.of(moves)
        masks[name] = Mask(mask.bits.to(tensor.device), mask.count)
    if not any(mask.count for mask in masks.values()):
        raise UserError(f"subspace.mask={path} lets no weight move: make one with scripts/score_weights.py")
    return masks


def check_file(path: str) -> None:
    """Refuse a file that is not there."""
    if not Path(path).is_file():
        raise UserError(f"subspace.mask={path}: there is no such file; make one with scripts/score_weights.py")


def _opened(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"subspace.mask={path} is no .safetensors file that can be read: {error}") from error


def _bin_of(count: int, values: Iterator[Tensor], bins: int) -> tuple[int, int]:
    """(the bin that the ``count``-th smallest of some integers is in, how many are in the bins before it)."""
    counts = torch.zeros(bins, dtype=torch.int64)
    for piece in values:
        counts += torch.bincount(piece, minlength=bins).cpu()
    # the first bin up to which there are at least `count` values
    below = counts.cumsum(0)
    index = int(torch.searchsorted(below, count))
    return index, int(below[index - 1]) if index else 0


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    yield from ((start, min(size, start + _PIECE)) for start in range(0, size, _PIECE))


@lru_cache
def _shifts(device: str) -> Tensor:
    # in the query's inference mode it would be no ordinary tensor, and is kept for the process
    with torch.inference_mode(False):
        return torch.arange(8, dtype=torch.uint8, device=device)
