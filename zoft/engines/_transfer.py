"""Copies between where weights rest and the device that computes: pinned memory, streams, and who waits for whom.

The only place of zoft that knows of CUDA's streams. On a CPU a thread stands in for the copying stream: it does the
same copies in the same order and counts the same events, so the order of everything is tested without a card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from zoft.utils.lazy import Tensor, torch

Pairs = Sequence[tuple["Tensor", "Tensor"]]
"""(from, to) of each tensor that is copied."""


class Transfer:
    """Copies in the order in which they are asked for, beside what computes: this is the CPU's, with a thread.

    ``counts`` has what was asked for: ``up`` and ``down`` (groups of copies), ``bytes_up`` and ``bytes_down``,
    ``waits`` (for a group that computing cannot go on without), ``pins`` (tensors put into pinned memory, to rest there
    or on their way from a file), ``non_blocking`` (copies that the host does not wait for) and ``buffers`` (bytes of
    device memory handed out).

    Example:
        >>> import torch
        >>> transfer = Transfer(torch.device("cpu"))
        >>> here = torch.zeros(3)
        >>> transfer.wait(transfer.up([(torch.ones(3), here)]))
        >>> here.tolist(), transfer.counts["bytes_up"]
        ([1.0, 1.0, 1.0], 12)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts: Counter[str] = Counter()
        self._pinned: set[int] = set()  # addresses of what rests in pinned memory
        self._thread = ThreadPoolExecutor(1, "zoft-transfer")  # one: in the order asked for

    def buffer(self, num_bytes: int) -> Tensor:
        """Memory of the device: uint8 [num_bytes], of any contents."""
        self.counts["buffers"] += num_bytes
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def resting(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory that copies can start from without a detour."""
        copy = self._rest(tensor.detach())
        self.counts["pins"] += 1
        self._pinned.add(copy.data_ptr())
        return copy

    def up(self, pairs: Pairs, then: Callable[[], None] | None = None) -> Any:
        """Begin to copy from where weights rest to the device, behind all that computes now.

        Args:
            pairs: (resting tensor, tensor on the device).
            then: called once the resting tensors have been read.

        Returns:
            What :meth:`wait` wants to know.
        """
        self._count("up", pairs)
        return self._begin(pairs, then)

    def down(self, pairs: Pairs, then: Callable[[], None] | None = None) -> Any:
        """Begin to copy back, what has been computed until now.

        Args:
            pairs: (tensor on the device, resting tensor).
            then: called once the resting tensors have been written.
        """
        self._count("down", pairs)
        return self._begin(pairs, then)

    def wait(self, ticket: Any) -> None:
        """What computes from now on sees the copies of ``ticket``; an error of theirs is raised here."""
        self.counts["waits"] += 1
        self._await(ticket)

    def drain(self, tickets: Sequence[Any]) -> None:
        """Return when the copies are done, so that the host may read what was written."""
        for ticket in tickets:
            self._await(ticket)

    def close(self) -> None:
        """End the thread; nothing can be copied afterwards."""
        self._thread.shutdown()

    def _count(self, way: str, pairs: Pairs) -> None:
        self.counts[way] += 1
        for source, target in pairs:
            is_pinned = (source if way == "up" else target).data_ptr() in self._pinned
            self.counts["pins"] += way == "up" and not is_pinned
            self.counts["non_blocking"] += way == "up" or is_pinned
        self.counts[f"bytes_{way}"] += sum(source.numel() * source.element_size() for source, _ in pairs)

    def _rest(self, tensor: Tensor) -> Tensor:
        return tensor

    def _begin(self, pairs: Pairs, then: Callable[[], None] | None) -> Future[Any]:
        return self._thread.submit(_copy, pairs, then)

    def _await(self, ticket: Any) -> None:
        ticket.result()


def _copy(pairs: Pairs, then: Callable[[], None] | None) -> None:
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
    if then is not None:
        then()


class CudaTransfer(Transfer):
    """The same with a stream of its own: copies from pinned memory run beside the kernels.

    What rests in a file is read into pinned memory by the thread first. Not run by the tests, which have no card.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def _rest(self, tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a copy in pinned memory, of its own storage
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def _begin(self, pairs: Pairs, then: Callable[[], None] | None) -> Future[Any]:
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.device))  # the buffer's last user, or the writer of the step
        return self._thread.submit(self._copy, pairs, then, computed)

    def _copy(self, pairs: Pairs, then: Callable[[], None] | None, computed: torch.cuda.Event) -> torch.cuda.Event:
        with torch.no_grad(), torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            for source, target in pairs:
                pinned = source if source.is_cuda or source.is_pinned() else source.pin_memory()
                target.copy_(pinned, non_blocking=target.is_cuda or target.is_pinned())
            done = torch.cuda.Event()
            done.record(self._stream)
        if then is not None:
            done.synchronize()
            then()
        return done

    def _await(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket.result())

    def drain(self, tickets: Sequence[Any]) -> None:
        """Return when the copies are done, so that the host may read what was written."""
        for ticket in tickets:
            ticket.result().synchronize()


def transfer_for(device: torch.device) -> Transfer:
    """The transfer of a device."""
    return CudaTransfer(device) if device.type == "cuda" else Transfer(device)
