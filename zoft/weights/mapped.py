"""Tensors in files, mapped into memory: where they lie in a checkpoint, or in a scratch file of the run's own."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from zoft.errors import DiskFullError
from zoft.utils.lazy import Tensor, torch

_maps: weakref.WeakValueDictionary[int, _Map] = weakref.WeakValueDictionary()  # by address, while a tensor is in it
_files: weakref.WeakValueDictionary[tuple[str, int], _Map] = weakref.WeakValueDictionary()  # checkpoints, mapped once


class _Map(mmap.mmap):
    """A mapped file; the tensors in it keep it alive."""

    is_scratch = False  # what is written into it is kept
    address = 0  # where it begins in memory

    def tensor(self, like: Tensor, offset: int) -> Tensor:
        """A tensor of this shape and dtype at ``offset`` bytes, with a storage of its own."""
        with torch.inference_mode(False):
            return torch.frombuffer(self, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)


def _mapped(descriptor: int, size: int, access: int) -> _Map:
    pages = _Map(descriptor, size, access=access)
    # known by address, so that release() finds the map of any view
    pages.address = int(torch.frombuffer(pages, dtype=torch.uint8, count=1).data_ptr())
    _maps[pages.address] = pages
    return pages


def scratch_copies(tensors: Sequence[Tensor], folder: str | None = None) -> list[Tensor]:
    """Copies of tensors in one file that has no name: it is gone when they are, also after a kill.

    Args:
        tensors: on the CPU, of any dtype; none may be empty.
        folder: where the file is made; the system's folder for temporary files if left out.

    Returns:
        Tensors of the same shapes, dtypes and values, each with a storage of its own; what is written into them is
        written into the file, and their memory can be taken back at any time (:func:`release`).

    Raises:
        DiskFullError: there is no room for the file.

    Example:
        >>> import torch
        >>> (copy,) = scratch_copies([torch.arange(3.0)])
        >>> copy.add_(1.0).tolist()
        [1.0, 2.0, 3.0]
    """
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += _page(tensor.numel() * tensor.element_size() + mmap.PAGESIZE - 1)  # a page belongs to one tensor
    place = folder or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            # reserved first: a full disk is an error here, and no signal in the middle of a step
            _reserve(file.fileno(), size)
            pages = _mapped(file.fileno(), size, mmap.ACCESS_WRITE)
            pages.is_scratch = True
            copies = [pages.tensor(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True)]
    except OSError as error:
        raise DiskFullError.of(error, Path(place), size) from None
    # copied and let go of one by one: no more than one tensor is in memory twice
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
        release(copy)
        release(tensor)
    return copies


def _reserve(descriptor: int, size: int) -> None:
    """Room on the disk now, rather than a signal when a page is written later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def mapped_where_it_lies(tensor: Tensor) -> Tensor | None:
    """The same tensor, mapped from the file that it is a view of; None where it is in ordinary memory.

    Loading a safetensors file gives views of the mapped file where the dtype is the wanted one. This is such a view
    that :func:`release` knows. The file is never written: what is written into the tensor stays until it is released.

    Args:
        tensor: contiguous, on the CPU.
    """
    place = _file_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    if place is None:
        return None
    path, offset = place
    stat = os.stat(path)
    # a file that was written anew is another file
    key = (path, stat.st_mtime_ns)
    pages = _files.get(key)
    if pages is None:
        with open(path, "rb") as file:
            pages = _files[key] = _mapped(file.fileno(), stat.st_size, mmap.ACCESS_COPY)
    again = pages.tensor(tensor, offset)
    # the bytes are compared: /proc/self/maps says where, and not that nobody has written there
    same = torch.equal(again.view(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8))
    release(again)
    if same:  # and it can be read again from the file, when it is
        _drop_pages(tensor)
    return again if same else None


def _drop_pages(tensor: Tensor) -> None:
    """Give back the whole pages of a view of another object's map, which has the values of its file."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    first, last = _page(address + mmap.PAGESIZE - 1), _page(address + size)
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def is_mapped(tensor: Tensor, *, to_write: bool = False) -> bool:
    """Whether :func:`release` can give back the tensor's memory.

    Args:
        tensor: any.
        to_write: also where it has been written: one of :func:`scratch_copies`.
    """
    place = _map_of(tensor) if tensor.is_cpu else None
    return place is not None and (place[1].is_scratch or not to_write)


def _map_of(tensor: Tensor) -> tuple[int, _Map] | None:
    """(offset of a tensor in its map, the map)."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    # A list made in one go: the copying thread asks here, and other models come and are collected meanwhile.
    for reference in _maps.valuerefs():
        pages = reference()
        if pages is not None and pages.address <= address and address + size <= pages.address + len(pages):
            return address - pages.address, pages
    return None


def _file_at(address: int, size: int) -> tuple[str, int] | None:
    """(file, offset) of what is mapped at some addresses, as Linux tells it; None elsewhere."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/maps").read_text().splitlines():
        # Linux: start-stop perms offset device inode path
        bounds, _, offset, _, inode, *path = line.split(maxsplit=5)
        start, stop = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address and address + size <= stop:
            is_file = inode != "0" and bool(path) and os.path.isfile(path[0])
            return (path[0], int(offset, 16) + address - start) if is_file else None
    return None


def release(tensor: Tensor) -> None:
    """Give back the memory of a mapped tensor, whose values stay in its file; nothing happens to any other tensor."""
    place = _map_of(tensor) if _maps and tensor.is_cpu else None
    if place is not None and hasattr(mmap, "MADV_DONTNEED"):
        start, pages = place
        # whole pages only: the first one may hold the end of another tensor
        first = _page(start)
        size = tensor.numel() * tensor.element_size()
        pages.madvise(mmap.MADV_DONTNEED, first, start + size - first)


def _page(size: int) -> int:
    """The last beginning of a page that is not behind ``size``."""
    return size // mmap.PAGESIZE * mmap.PAGESIZE
