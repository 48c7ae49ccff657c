"""Chunks of a journal file: length, kind, payload, and a checksum chained over all chunks before.

    length   u32, of the payload, in bytes
    kind     u8
    payload
    check    u32: CRC-32 of (check of the chunk before, length, kind, payload); 0 stands before the first

All numbers are little-endian. A chunk is whole or it does not count: a file that was cut anywhere reads as the chunks
before the cut, and a chunk that was changed, moved or left out breaks the chain there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

HEADER, STEP, OBSERVATION, DIGEST, EVALUATION, NOTE, BLOCK = b"H", b"S", b"L", b"D", b"E", b"N", b"B"
KINDS = (HEADER, STEP, OBSERVATION, DIGEST, EVALUATION, NOTE, BLOCK)
"""What the run is; a step; what a subspace saw before a step; a hash of the weights and an
evaluation after one; what else happened; many steps sealed."""

# little-endian whatever the machine: a journal may be read elsewhere
_FRONT, _CHECK = struct.Struct("<Ic"), struct.Struct("<I")
_LONGEST = 1 << 31


@dataclass(frozen=True)
class Chunk:
    """One chunk as it lies in the file.

    Args:
        kind: one byte, of :data:`KINDS`.
        payload: its bytes.
        end: offset behind it.
        check: its checksum, which the next one continues.
    """

    kind: bytes
    payload: bytes
    end: int
    check: int


def encode(kind: bytes, payload: bytes, before: int) -> tuple[bytes, int]:
    """A chunk's bytes and its check.

    Args:
        kind: one byte.
        payload: what it holds.
        before: the check of the chunk before, 0 for the first.

    Example:
        >>> data, check = encode(STEP, b"abc", 0)
        >>> [chunk.payload for chunk in decode(data)]
        [b'abc']
    """
    front = _FRONT.pack(len(payload), kind)
    # the chain begins with the check before: a chunk that was left out or moved breaks it, though whole by itself
    check = zlib.crc32(payload, zlib.crc32(front, zlib.crc32(_CHECK.pack(before))))
    return front + payload + _CHECK.pack(check), check


def decode(data: bytes) -> Iterator[Chunk]:
    """The whole chunks from the start of the data, up to its end or to the first that is cut or damaged."""
    at, before = 0, 0
    while at + _FRONT.size + _CHECK.size <= len(data):
        length, kind = _FRONT.unpack_from(data, at)
        end = at + _FRONT.size + length + _CHECK.size
        # what cannot be a length or a kind is the rest of a write that a crash has cut
        if length > _LONGEST or end > len(data) or kind not in KINDS:
            return
        payload = data[at + _FRONT.size : end - _CHECK.size]
        expected = zlib.crc32(payload, zlib.crc32(_FRONT.pack(length, kind), zlib.crc32(_CHECK.pack(before))))
        (check,) = _CHECK.unpack_from(data, end - _CHECK.size)
        # everything behind a broken chunk is unread: its checks continue one that is not there
        if check != expected:
            return
        yield Chunk(kind, payload, end, check)
        at, before = end, check
