"""The GPU's kernels: the torch functions at the end of this file, compiled by inductor (Triton on CUDA).

Not run on a GPU so far: there was none. On a CPU, through the same inductor, their bits are those of the eager code,
and that is what the tests check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoft.noise.kernels.base import Kernels, Stream

log = logging.getLogger(__name__)

_HOW: dict[str, Any] = {
    "dynamic": True,
    "fullgraph": True,
    # Once for each law, dtype, number of scales, in place or not: more than dynamo's eight, and never per step.
    "recompile_limit": 64,
    # Triton fuses a multiply and an add into one rounding unless told not to, and this is inductor's only switch for
    # it (it becomes the kernel's enable_fp_fusion=False). Inductor's C++ has -ffp-contract=off of its own.
    "options": {"emulate_precision_casts": True},
}


class InductorKernels(Kernels):
    """Torch functions under ``torch.compile``, for any size, key and scale without compiling again.

    Numbers travel as tensors of no dimension on the CPU: inductor hands their values to the kernel, where a Python
    number would be compiled in.

    Args:
        device: where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        self.about = "triton" if device.type == "cuda" else "inductor"
        self._compiled: dict[str, Callable[..., Any]] = {}

    def words(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        self._run("words_into", out, *_numbers(stream, offset))

    def draw(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        self._run("draw_into", out, *_numbers(stream, offset))

    def add_(self, stream: Stream, offset: int, out: Tensor, scale: float) -> None:
        """See :class:`Kernels`."""
        self._run("add_into", out, torch.tensor(scale, dtype=torch.float32), *_numbers(stream, offset))

    def perturb(
        self, stream: Stream, offset: int, weight: Tensor, scales: Sequence[float], outs: Sequence[Tensor]
    ) -> None:
        """See :class:`Kernels`."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        factors = [torch.tensor(scale, dtype=wide) for scale in scales]
        # a view of the weight would be another input in the same memory; the weight itself is known to be the same one
        written = [weight if out.data_ptr() == weight.data_ptr() else out for out in outs]
        self._run("perturb_into", weight, written, factors, *_numbers(stream, offset))

    def gather(self, stream: Stream, indices: Tensor, out: Tensor) -> None:
        """See :class:`Kernels`."""
        self._run("gather_into", out, indices, *_numbers(stream, 0))

    def squared_norm(self, stream: Stream, offset: int, count: int) -> int:
        """See :class:`Kernels`."""
        assert stream.table is not None
        total = torch.zeros((), dtype=torch.int64, device=stream.table.device)
        for at in range(0, count, 1 << 22):  # the generic reduction may keep what it sums
            z = torch.empty(min(1 << 22, count - at), device=stream.table.device)
            self.draw(stream, offset + at, z)
            total += z.mul_(65536.0).to(torch.int64).square_().sum()
        return int(total)

    def _run(self, function: str, *arguments: Any) -> None:
        plain = globals()[function]
        with torch.no_grad():
            if self.failure or arguments[0].numel() < 2:  # sizes 0 and 1 would be compiled for themselves
                plain(*arguments)
                return
            if function not in self._compiled:
                self._compiled[function] = torch.compile(plain, **_HOW)
            try:
                self._compiled[function](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # nothing is written yet: what fails is the compiler
                self.failure = str(error).split("\n")[0]
                log.warning("compiling the noise failed, it goes on uncompiled: %s", self.failure)
                plain(*arguments)


def _numbers(stream: Stream, offset: int) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    return (
        stream.table,
        torch.tensor(stream.low, dtype=torch.int32),
        torch.tensor(stream.high, dtype=torch.int32),
        torch.tensor(stream.factor, dtype=torch.float32),
        torch.tensor(offset, dtype=torch.int64),
    )


# ---- The operations on noise as torch functions: what inductor compiles, and right uncompiled too --------------------


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
