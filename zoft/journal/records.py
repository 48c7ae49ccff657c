"""The bytes of a journal's steps: the record of one step, and sealed blocks of many."""

from __future__ import annotations

import json
import struct
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoft.errors import UserError

SKIPPED, COMPUTED, GUARDED = 1, 2, 4
"""Flags: nothing was written to the weights; the record does not suffice to repeat the step (part of it was a gradient,
or the queries have left something in the weights); a guard took the step for one outside the running range."""

BLOCK_STEPS = 4096
"""The most steps in a sealed block."""

_LARGEST = 1 << 28  # bytes of a block
_FIXED = struct.Struct("<IHHHIQddQQdd")  # step, flags, terms, curvatures, extra bytes, seed, lr, eps, ...


@dataclass(frozen=True)
class Record:
    """One optimisation step.

    Args:
        step: number of the step, from 0.
        seed: of its directions; direction i is (seed, step, i) where ``extra`` does not say otherwise.
        lr: learning rate it was written with.
        eps: finite-difference radius, in units of the weights; 0 where there is none.
        queries: forward passes of the run up to here, this step's included.
        tokens: tokens that went through the model up to here.
        loss: training loss of the step; NaN where it was not finite.
        slope: root mean square of the projected gradients.
        coefficients: one a direction, as they were handed to the optimizer.
        curvatures: along the directions, where they were measured.
        flags: sum of :data:`SKIPPED`, :data:`COMPUTED` and :data:`GUARDED`.
        extra: what is rarely there: ``directions`` (seed, step, probe, example), ``scalars`` (what parts remember).
    """

    step: int
    seed: int
    lr: float
    eps: float
    queries: int
    tokens: int
    loss: float
    slope: float
    coefficients: tuple[float, ...] = ()
    curvatures: tuple[float, ...] = ()
    flags: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether the step moved nothing."""
        return bool(self.flags & SKIPPED)

    @property
    def computed(self) -> bool:
        """Whether the step cannot be repeated from its record."""
        return bool(self.flags & COMPUTED)

    @property
    def guarded(self) -> bool:
        """Whether the step was outside the running range of a guard, which does not count it."""
        return bool(self.flags & GUARDED)


def encode(record: Record) -> bytes:
    """A record's bytes: 70 fixed ones, 8 a coefficient and curvature, and the extra as JSON.

    Example:
        >>> record = Record(0, 7, 1e-3, 1e-3, 2, 64, 0.5, 1.5, (0.25,))
        >>> len(encode(record)), decode(encode(record)) == record
        (78, True)
    """
    # no bytes at all for most steps
    extra = json.dumps(record.extra, separators=(",", ":")).encode() if record.extra else b""
    # fixed fields first, so that lengths are known before what they are of
    fixed = _FIXED.pack(
        record.step,
        record.flags,
        len(record.coefficients),
        len(record.curvatures),
        len(extra),
        record.seed,
        record.lr,
        record.eps,
        record.queries,
        record.tokens,
        record.loss,
        record.slope,
    )
    numbers = (*record.coefficients, *record.curvatures)
    return fixed + struct.pack(f"<{len(numbers)}d", *numbers) + extra


def decode(data: bytes) -> Record:
    """The record that :func:`encode` made these bytes of."""
    step, flags, num_terms, num_curvatures, num_bytes, seed, lr, eps, queries, tokens, loss, slope = _FIXED.unpack_from(
        data
    )
    at = _FIXED.size
    values = struct.unpack_from(f"<{num_terms + num_curvatures}d", data, at)
    at += 8 * (num_terms + num_curvatures)
    fields = json.loads(data[at : at + num_bytes]) if num_bytes else {}
    return Record(
        step, seed, lr, eps, queries, tokens, loss, slope,
        values[:num_terms], values[num_terms:], flags, _fitting(fields),
    )  # fmt: skip


def _fitting(extra: Any) -> dict[str, Any]:
    """A record's extra fields, if they have the shapes that replay reads.

    Raises:
        ValueError: they have others.
    """
    fine = isinstance(extra, dict) and isinstance(extra.get("scalars", {}), dict)
    directions, parts = (extra.get("directions", []), extra.get("parts", 1)) if fine else ([], 0)
    fine = fine and isinstance(directions, list) and all(_is_direction(which) for which in directions)
    if not fine or not isinstance(parts, int) or parts < 1:
        raise ValueError("a step says more than a step can say")
    return dict(extra)


def _is_direction(which: Any) -> bool:
    """(seed, step, index, example), of which the last two may be left out."""
    if not isinstance(which, list) or not 2 <= len(which) <= 4:
        return False
    return all(isinstance(number, int) or (place == 3 and number is None) for place, number in enumerate(which))


def require_consecutive(records: Sequence[Record], first: int) -> None:
    """Refuse steps that do not follow each other, and queries that do not add up.

    Raises:
        ValueError: naming the step.
    """
    queries = 0
    for number, record in enumerate(records, start=first):
        if record.step != number:
            raise ValueError(f"step {record.step} stands where step {number} belongs")
        # queries only grow, and by no more than a step can make: a damaged total would end a budget at once
        if not 0 <= record.queries - queries < 1 << 32 and number > first:
            raise ValueError(f"step {number} has used {record.queries - queries} queries")
        queries = record.queries


# ---- sealed ----------------------------------------------------------------------------------------------------------


def seal(records: Sequence[Record], *, with_losses: bool = False) -> bytes:
    """Consecutive steps as one block: what their weights need, by columns, and what parts remember after the last.

    A step of one direction takes four bytes or less; losses, tokens and slopes are left out (metrics.csv has them),
    where no later step depends on them.

    Args:
        records: of consecutive steps.
        with_losses: keep losses and slopes: a guard judges later steps by them.
    """
    # what the weights need of all steps, one column a field: alike values lie together
    coefficients = [c for record in records for c in record.coefficients]
    bends = [c for record in records for c in record.curvatures]
    # float32 where that is exact, as measured coefficients are; half the bytes
    narrow = _is_single(coefficients) and _is_single(bends)
    code = "f" if narrow else "d"
    # by the step's place in the block, since most have the run's own directions
    extras = {i: r.extra["directions"] for i, r in enumerate(records) if "directions" in r.extra}
    columns: dict[str, array[Any]] = {
        "flags": array("H", [r.flags for r in records]),
        "terms": array("H", [len(r.coefficients) for r in records]),
        "bends": array("H", [len(r.curvatures) for r in records]),
        "seed": array("Q", [r.seed for r in records]),
        "lr": array("d", [r.lr for r in records]),
        "eps": array("d", [r.eps for r in records]),
        # differences: they are the same in most steps, and compress to nothing
        "queries": array("I", [b - a for a, b in _steps([r.queries for r in records])]),
        "coefficients": array(code, coefficients),
        "curvatures": array(code, bends),
    }
    last = records[-1]
    header = {
        "first": records[0].step,
        "count": len(records),
        "code": code,
        "queries": records[0].queries,
        "tokens": last.tokens,
        "directions": extras,
        "scalars": last.extra.get("scalars"),
        "parts": last.extra.get("parts"),
        "losses": [r.loss for r in records] if with_losses else None,
        "slopes": [r.slope for r in records] if with_losses else None,
        # each column's bytes, so that a reader can cut them apart again
        "sizes": [len(_shuffled(column)) for column in columns.values()],
    }
    # empty fields are left out
    front = json.dumps({k: v for k, v in header.items() if v}, separators=(",", ":")).encode()
    body = b"".join(_shuffled(column) for column in columns.values())
    return zlib.compress(struct.pack("<I", len(front)) + front + body, 9)


def unseal(data: bytes) -> list[Record]:
    """The steps of a block; only the last says tokens and what parts remember, losses may have been left out (NaN)."""
    block = _inflated(data)
    (length,) = struct.unpack_from("<I", block)
    header = json.loads(block[4 : 4 + length])
    # checked before the loops below run that many times
    at, columns = 4 + length, []
    count, code = header["count"], header["code"]
    if not (isinstance(count, int) and 1 <= count <= BLOCK_STEPS) or code not in ("f", "d"):
        raise ValueError(f"a block of {count} steps")
    for kind, size in zip(("H", "H", "H", "Q", "d", "d", "I", code, code), header["sizes"], strict=True):
        columns.append(_unshuffled(kind, block[at : at + size]))
        at += size
    flags, num_terms, num_curvatures, seeds, rates, eps, gaps, coefficients, curvatures = columns
    queries, c, b, records = header["queries"], 0, 0, []
    losses, slopes = (header.get(name) or [float("nan")] * count for name in ("losses", "slopes"))
    # NaN where losses were left out: metrics.csv has them
    directions = {int(i): which for i, which in header.get("directions", {}).items()}
    for i in range(count):
        queries += gaps[i]
        records.append(
            Record(
                header.get("first", 0) + i, seeds[i], rates[i], eps[i], queries, 0, losses[i], slopes[i],
                tuple(coefficients[c : c + num_terms[i]]), tuple(curvatures[b : b + num_curvatures[i]]), flags[i],
                _fitting({"directions": directions[i]}) if i in directions else {},
            )
        )  # fmt: skip
        c, b = c + num_terms[i], b + num_curvatures[i]
    remembered = {key: header[key] for key in ("scalars", "parts") if key in header}
    last = records[-1]
    # tokens and what parts remember are those after the last step: a run that goes on needs no earlier ones
    records[-1] = replace(last, tokens=header.get("tokens", 0), extra=_fitting(last.extra | remembered))
    return records


def _inflated(data: bytes) -> bytes:
    """Decompressed, up to what a block can hold: a small file must not fill the memory."""
    inflate = zlib.decompressobj()
    block = inflate.decompress(data, _LARGEST)
    if inflate.unconsumed_tail:
        raise UserError(f"a block of the journal is larger than {_LARGEST} bytes: it was not written by zoft")
    return block


def _steps(values: list[int]) -> list[tuple[int, int]]:
    """(the value before, each value); the first has itself before it."""
    # differences within the block: its first step counts from itself, with the total in the header
    return list(zip([values[0], *values[:-1]], values, strict=True))


def _is_single(values: Sequence[float]) -> bool:
    """Whether float32 holds all of them exactly."""
    return list(array("f", values)) == list(values)


def _shuffled(column: array[Any]) -> bytes:
    """First bytes of all values, then second bytes, ...: what is alike lies together and compresses."""
    data, size = column.tobytes(), column.itemsize
    return b"".join(data[i::size] for i in range(size))


def _unshuffled(kind: str, data: bytes) -> array[Any]:
    column = array(kind)
    size, count = column.itemsize, len(data) // column.itemsize
    values = bytearray(len(data))
    for i in range(size):
        # value i of byte plane p lies at p * count + i
        values[i::size] = data[i * count : (i + 1) * count]
    column.frombytes(bytes(values))
    return column
