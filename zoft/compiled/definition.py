"""The operations on noise as torch functions: what inductor compiles, and right uncompiled too.

Imported only to be compiled, so that torch here is torch itself: dynamo cannot see through zoft.lazy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def words_into(out: Tensor, table: Tensor | None, low: Tensor, high: Tensor, factor: Tensor, offset: Tensor) -> None:
    """``out`` = the words from ``offset`` on, int32."""
    positions = torch.arange(out.numel(), device=out.device) + offset
    out.copy_(_random_words(positions, low, high))


def draw_into(out: Tensor, *numbers: Any) -> None:
    """``out = z``."""
    out.copy_(_z(torch.arange(out.numel(), device=out.device), *numbers))


def add_into(out: Tensor, scale: Tensor, *numbers: Any) -> None:
    """``out += z * scale``."""
    out.add_(_z(torch.arange(out.numel(), device=out.device), *numbers) * scale)


def perturb_into(weight: Tensor, outs: list[Tensor], scales: list[Tensor], *numbers: Any) -> None:
    """``outs[i] = z * scales[i] + weight``, in the dtype of the scales, rounded once."""
    z = _z(torch.arange(weight.numel(), device=weight.device), *numbers).to(scales[0].dtype)
    for out, scale in zip(outs, scales, strict=True):
        out.copy_(z * scale + weight)


def gather_into(out: Tensor, indices: Tensor, *numbers: Any) -> None:
    """``out = z[indices]``."""
    out.copy_(_z(indices, *numbers))


def _z(positions: Tensor, table: Tensor | None, low: Tensor, high: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Elements of a stream at ``positions`` (int64) past ``offset``: one hash an element, nothing is shared."""
    positions = positions + offset
    if table is None:
        bits = (_random_words(positions >> 5, low, high) >> (positions & 31).to(torch.int32)) & 1
        return (bits * 2 - 1).to(torch.float32)
    halves = (_random_words(positions >> 1, low, high) >> ((positions & 1) * 16).to(torch.int32)) & 0xFFFF
    return table[halves] * factor


def _random_words(indices: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """noise.random_words within a block, out of place: int32 products wrap, shifts are made logical by a mask."""
    words = (indices.to(torch.int32) * -0x61C88647) ^ low  # 0x9E3779B9 as a signed number
    return _mix(_mix(words) + high)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ ((words >> 16) & 0xFFFF)) * 0x7FEB352D
    words = (words ^ ((words >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return words ^ ((words >> 16) & 0xFFFF)
