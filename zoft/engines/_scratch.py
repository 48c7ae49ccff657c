"""Memory that is used again and again: perturbed weights live here while their module computes."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from zoft.utils.lazy import Tensor, torch

_ALIGN = 64  # bytes: a view begins where vector instructions like it


class Lease:
    """Some tensors side by side in one buffer, for a while.

    Args:
        buffer: bytes.
        like: tensors whose shapes and dtypes the leased ones have.
    """

    def __init__(self, buffer: Tensor, like: Sequence[Tensor]) -> None:
        self.buffer = buffer
        self.tensors: list[Tensor] = []
        start = 0
        with torch.inference_mode(False):  # as normal tensors they may be written and swapped in anywhere
            for tensor in like:
                stop = start + tensor.numel() * tensor.element_size()
                # the same bytes read as another dtype: nothing is copied
                self.tensors.append(buffer[start:stop].view(tensor.dtype).view(tensor.shape))
                start = aligned(stop)

    def appears_in(self, values: object) -> bool:
        """Whether a tensor in ``values`` (also inside tuples, lists, dicts) is a view of this memory."""
        if isinstance(values, torch.Tensor):
            # the same storage, whatever view of it an output is
            return values.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()
        if isinstance(values, dict):
            return any(map(self.appears_in, values.values()))
        return isinstance(values, (tuple, list)) and any(map(self.appears_in, values))


class Scratch:
    """Buffers that are kept between queries: as many as were in use at once, none larger than was asked for.

    New memory for every module would cost as much as filling it: the system hands it out page by page, zeroed.
    """

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}  # the smallest buffer first

    def lease(self, like: Sequence[Tensor]) -> Lease:
        """Memory for tensors of these shapes and dtypes, on the first one's device; its contents are arbitrary."""
        size = sum(aligned(tensor.numel() * tensor.element_size()) for tensor in like)
        free = self._free.setdefault(like[0].device, [])
        # best fit: a large buffer is left for a large module
        at = bisect_left(free, size, key=torch.Tensor.numel)
        if at < len(free):
            return Lease(free.pop(at), like)
        if free:
            # a larger buffer takes the place of the largest: in time all of them fit the largest module
            free.pop()
        with torch.inference_mode(False):
            return Lease(torch.empty(size, dtype=torch.uint8, device=like[0].device), like)

    def give_back(self, lease: Lease) -> None:
        """The lease's tensors must not be used any more."""
        insort(self._free[lease.buffer.device], lease.buffer, key=torch.Tensor.numel)


def aligned(size: int) -> int:
    """The bytes that a tensor of ``size`` bytes takes in a buffer."""
    return -(-size // _ALIGN) * _ALIGN
