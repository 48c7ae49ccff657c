"""What a compiled backend offers: the noise of one stream, made and used in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zoft.utils.lazy import Tensor, torch


class Stream(NamedTuple):
    """One block of one stream of noise: which bits, and how they become numbers."""

    low: int  # the block's key: its halves as signed 32-bit integers
    high: int
    table: Tensor | None = None  # 65,536 quantiles of N(0, 1), float32, on the device; None: Rademacher
    factor: float = 1.0  # what the Gaussian is scaled with, in float32 (sphere)


class Kernels:
    """The operations of :class:`zoft.noise.source.CounterNoise` within one block of words: the bits of its eager code.

    ``offset`` counts elements from the block's start. Tensors are flat, contiguous and on the backend's device; what
    is written is given by the caller, so that nothing of its size is made here.
    """

    about: str
    """What compiled them, in words."""

    dtypes: tuple[torch.dtype, ...]
    """Of the weights that :meth:`perturb` knows."""

    def words(self, stream: Stream, offset: int, out: Tensor) -> None:
        """The random words [offset, offset + out.numel()), int32."""
        raise NotImplementedError

    def draw(self, stream: Stream, offset: int, out: Tensor) -> None:
        """``out = z``, float32."""
        raise NotImplementedError

    def add_(self, stream: Stream, offset: int, out: Tensor, scale: float) -> None:
        """``out += z * scale``, float32."""
        raise NotImplementedError

    def perturb(
        self, stream: Stream, offset: int, weight: Tensor, scales: Sequence[float], outs: Sequence[Tensor]
    ) -> None:
        """``outs[i] = weight + z * scales[i]`` in the wide dtype, rounded once; a single out may be the weight."""
        raise NotImplementedError

    def add_product(self, left: Tensor, right: Tensor, out: Tensor, scale: float) -> bool:
        """``out += scale * (left @ right)`` term by term, for left [m, r], right [r, n], out [m * n], all float32.

        Returns whether it was done: a backend may leave it to eager code.
        """
        del left, right, out, scale
        return False

    def gather(self, stream: Stream, indices: Tensor, out: Tensor) -> None:
        """``out = z[indices]``: int64 indices from the block's start, float32 out."""
        raise NotImplementedError

    def squared_norm(self, stream: Stream, offset: int, count: int) -> int:
        """The sum of squares of Gaussian elements, exact, in units of 2^-32; at most 2^26 of them."""
        raise NotImplementedError
