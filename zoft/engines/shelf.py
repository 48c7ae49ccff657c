"""Tensors kept by key, in memory up to a bound and then in a temporary file up to another."""

from __future__ import annotations

import tempfile
from typing import IO, TYPE_CHECKING, Any

from zoft.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Shelf:
    """What is put on it comes back bit for bit; what has no room is not kept.

    Args:
        memory_bytes: bound of what stays in memory, on the tensors' own device.
        disk_bytes: bound of the file, which is in the system's folder for temporary files (TMPDIR) and vanishes with
            the process; 0 for none.

    Example:
        >>> import torch
        >>> shelf = Shelf(8, 1000)
        >>> shelf.put(b"a", torch.ones(2)), shelf.put(b"b", torch.arange(3.0))
        (True, True)
        >>> shelf.get(b"b")
        tensor([0., 1., 2.])
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0) -> None:
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self._near: dict[bytes, Tensor] = {}
        self._far: dict[
            bytes, tuple[int, int, Tensor]
        ] = {}  # key -> offset, bytes, an empty one of its dtype and device
        self._shapes: dict[bytes, torch.Size] = {}
        self._file: IO[bytes] | None = None
        self.bytes_near = self.bytes_far = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._near or key in self._far

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def put(self, key: bytes, tensor: Tensor) -> bool:
        """Keep a tensor; returns whether there was room."""
        size = tensor.numel() * tensor.element_size()
        if self.bytes_near + size <= self.memory_bytes:
            self._near[key] = tensor
            self.bytes_near += size
            return True
        if self.bytes_far + size > self.disk_bytes:
            return False
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="zoft_")  # noqa: SIM115 - open for as long as this is
        self._file.seek(self.bytes_far)
        self._file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self._far[key] = (self.bytes_far, size, tensor.new_empty(0))
        self._shapes[key] = tensor.shape
        self.bytes_far += size
        return True

    def get(self, key: bytes) -> Tensor | None:
        """The tensor, or None where it is not kept."""
        if key not in self._far or self._file is None:
            return self._near.get(key)
        offset, size, like = self._far[key]
        self._file.seek(offset)
        read: Any = torch.frombuffer(bytearray(self._file.read(size)), dtype=like.dtype)
        return read.view(self._shapes[key]).to(like.device)
