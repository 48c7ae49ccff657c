"""A GPU's kernels: noise_triton.py, compiled by Triton at the first launch of each kind and kept in Triton's cache.

Not run on a GPU so far: there was none. Their bits are tested on a CPU by Triton's interpreter, and that they compile
for the cards there are, without a fused multiply-add, by its compiler (`make test-triton`); a run on a GPU compares
them with the eager code's before its first step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from zoft.noise.kernels.base import Kernels, Stream
from zoft.utils.lazy import Tensor, torch

_ELEMENTS = 2048  # that a program makes: 16 a thread
_TILE = {"ROWS": 16, "COLUMNS": 128}  # of a product: a factor's row is read once for 16 rows of what it is added to


class CudaKernels(Kernels):
    """Launches of the kernels of a module.

    Args:
        code: noise_triton.py as a module.
        about: what runs it, in words.
    """

    def __init__(self, code: ModuleType, about: str) -> None:
        self.about = about
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        self._code = code

    def words(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        count = out.numel()
        self._launch("words", count, _ELEMENTS, _written(out), stream.low, stream.high, offset, count, WORDS=_ELEMENTS)

    def draw(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        self._on_words("draw", (_written(out),), stream, offset, out.numel())

    def add_(self, stream: Stream, offset: int, out: Tensor, scale: float) -> None:
        """See :class:`Kernels`."""
        self.perturb(stream, offset, out, [scale], [out])

    def perturb(
        self, stream: Stream, offset: int, weight: Tensor, scales: Sequence[float], outs: Sequence[Tensor]
    ) -> None:
        """See :class:`Kernels`; z is made once for every two scales."""
        for i in range(0, len(outs), 2):
            scale_a, scale_b = scales[i], scales[min(i + 1, len(outs) - 1)]
            two, out_a, out_b = i + 1 < len(outs), outs[i], outs[min(i + 1, len(outs) - 1)]
            tensors = weight, _written(out_a), _written(out_b)
            assert all(out.dtype == weight.dtype and out.numel() == weight.numel() for out in tensors)
            numbers = *_halves(scale_a), *_halves(scale_b)
            self._on_words("perturb", (*tensors, *numbers), stream, offset, weight.numel(), TWO=two)

    def add_product(self, left: Tensor, right: Tensor, out: Tensor, scale: float) -> bool:
        """See :class:`Kernels`."""
        (rows, rank), columns = left.shape, right.shape[1]
        assert out.numel() == rows * columns
        assert left.is_contiguous()
        assert right.is_contiguous()
        programs = -(-rows // _TILE["ROWS"]) * -(-columns // _TILE["COLUMNS"])
        self._launch("add_product", programs, 1, _written(out), left, right, scale, rows, columns, rank, **_TILE)
        return True

    def gather(self, stream: Stream, indices: Tensor, out: Tensor) -> None:
        """See :class:`Kernels`."""
        count = indices.numel()
        numbers = indices, stream.table, stream.low, stream.high, stream.factor, count
        constants: dict[str, Any] = {"GAUSSIAN": stream.table is not None, "BLOCK": _ELEMENTS}
        self._launch("gather", count, _ELEMENTS, _written(out), *numbers, **constants)

    def squared_norm(self, stream: Stream, offset: int, count: int) -> int:
        """See :class:`Kernels`."""
        assert stream.table is not None
        first, lead = divmod(offset, 2)
        programs = -(-(lead + count) // _ELEMENTS)
        sums = torch.zeros(programs, dtype=torch.int64, device=stream.table.device)
        numbers = stream.table, stream.low, stream.high, first, lead, count
        self._launch("squared_norm", programs, 1, sums, *numbers, WORDS=_ELEMENTS // 2)
        return int(sums.sum())

    def _on_words(
        self, kernel: str, arguments: tuple[Any, ...], stream: Stream, offset: int, count: int, **which: bool
    ) -> None:
        """One program for the words of 2,048 elements, beginning with the word that holds element ``offset``."""
        gaussian = stream.table is not None
        per_word = 2 if gaussian else 32
        first, lead = divmod(offset, per_word)
        numbers = stream.table, stream.low, stream.high, stream.factor, first, lead, count
        constants: dict[str, Any] = {**which, "GAUSSIAN": gaussian, "WORDS": _ELEMENTS // per_word}
        self._launch(kernel, lead + count, _ELEMENTS, *arguments, *numbers, **constants)

    def _launch(self, kernel: str, elements: int, each: int, out: Tensor, *arguments: Any, **which: Any) -> None:
        if out.numel():
            grid = (-(-elements // each),)
            with _current(out.device):
                getattr(self._code, kernel)[grid](out, *arguments, **which, enable_fp_fusion=False)


def load() -> CudaKernels:
    """The kernels; they are compiled when first launched.

    Raises:
        RuntimeError: triton is not installed.
    """
    try:
        import triton

        from zoft.noise.kernels import noise_triton
    except ImportError as error:
        raise RuntimeError(f"triton cannot be imported ({error}): pip install triton") from error
    return CudaKernels(noise_triton, f"triton {triton.__version__}")


def _halves(scale: float) -> tuple[int, int]:
    """The low and the high 32 bits of a float64, each as a signed number."""
    low, high = struct.unpack("<ii", struct.pack("<d", scale))
    return low, high


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, whichever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _written(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous(), tensor.stride()
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # autograd learns of the write, as of any other in place
    return tensor
