"""A run's journal file: opened by one process, appended to step by step, never left half-written."""

from __future__ import annotations

import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

from zoft.errors import DiskFullError, UserError
from zoft.journal import chunks, records
from zoft.journal.records import Record
from zoft.utils import shared
from zoft.utils.files import write_atomically

NAME = "journal.bin"
FORMAT = 1
_DIGEST = struct.Struct("<I32s")
_NUMBER = struct.Struct("<I")
_BROKEN = (MemoryError, RecursionError, struct.error, zlib.error)


class Header(TypedDict, total=False):
    """What a run is.

    Args:
        format: of the file.
        run: identifier of the run.
        first: number of the first step.
        weights: SHA-256 of the trained weights before it; None where a checkpoint has them.
        settings: what must not change while the run goes on.
        model: where the model was loaded from, or its class.
        frozen: a fingerprint of what is not trained.
        lr_factor: what returns before the first step have left of the learning rate.
        merged: how, and of which runs, a merged journal was made.
    """

    format: int
    run: str
    first: int
    weights: str | None
    settings: dict[str, Any]
    model: str
    frozen: str | None
    lr_factor: float
    merged: dict[str, Any]


class Note(TypedDict, total=False):
    """What later steps depend on beside the records: a return halves the learning rate (``lr_factor``)."""

    lr_factor: float


@dataclass
class Contents:
    """What a journal file holds.

    Args:
        header: what the run is.
        records: the steps, in order.
        observations: step -> what the subspace observed before it, and its factors (bytes of `zoft.journal.state`).
        digests: number of steps done -> SHA-256 of the trained weights then.
        evaluations: number of steps done -> the metrics of the evaluations made then, in order.
        notes: what else happened, in order: ``lr_factor`` where the run went back at a lower learning rate.
        damaged: bytes at the end that are no whole chunks: cut by a crash, or changed.
    """

    header: Header
    records: list[Record] = field(default_factory=list)
    observations: dict[int, bytes] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    damaged: int = 0

    @property
    def end(self) -> int:
        """The number of steps that the journal knows, those before its first one included."""
        return self.records[-1].step + 1 if self.records else int(self.header["first"])


def read(path: Path) -> Contents:
    """All that is whole in a journal file.

    Raises:
        UserError: there is none, it is not a journal, or its format is another one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    contents: Contents | None = None
    end = 0
    try:
        for chunk in chunks.decode(data):
            if contents is None:
                contents = Contents(_header(path, chunk))
            else:
                _take(contents, chunk)
            # up to here the file is whole; what follows is cut off when the journal is opened again
            end = chunk.end
        if contents is not None:
            records.require_consecutive(contents.records, contents.header["first"])
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, *_BROKEN) as error:
        # Whole by its checksum, which anybody can compute: it was not written by zoft.
        raise UserError(f"{path} holds what zoft does not write ({error}): start a new run in another folder") from None
    if contents is None:
        raise UserError(
            f"{path} is not a journal of zoft, or its first bytes are damaged: move it away, and the run goes on from "
            "its newest checkpoint"
        )
    # damage is reported, not refused: the run goes on from the steps before it
    contents.damaged = len(data) - end
    return contents


class Journal:
    """A journal that is being written: every chunk is on the disk when the call returns.

    Args:
        path: the file; made by :meth:`create`, or continued by :meth:`open`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> journal = Journal.create(folder / "journal.bin", {"weights": "ab"})
        >>> journal.append(Record(0, 7, 1e-3, 1e-3, 2, 64, 0.5, 1.5, (0.25,)))
        >>> journal.close()
        >>> read(folder / "journal.bin").end
        1
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        self._check = 0
        self._end = 0

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """A new journal in the place of one that may be there, which is kept beside it as ``journal.old.bin``.

        Args:
            path: the file.
            header: what the run is; ``format``, ``run`` and ``first`` are added.
        """
        # run is a name by chance: a checkpoint says by it whether it belongs to this journal
        fields = {"format": FORMAT, "run": uuid.uuid4().hex, "first": 0, **header}
        data, _ = chunks.encode(chunks.HEADER, json.dumps(fields, sort_keys=True).encode(), 0)
        # the earlier file is kept beside the new one: it may be all that is left of a run
        if path.exists():
            shared.close(_opened(path))  # refused while another process writes it
            path.replace(path.with_suffix(".old.bin"))
        with _full_disk_said(path, len(data)):
            write_atomically(path, data)
        return cls.open(path, 0)

    @classmethod
    def open(cls, path: Path, end: int) -> Journal:
        """Continue a journal behind its first steps; what comes after them is cut off.

        Notes are kept, whenever they were made: what is learnt from a step that is taken back holds for those to come.

        Args:
            path: the file.
            end: number of steps to keep; larger than there are keeps all.
        """
        journal, step = cls(path), -1
        cut: list[chunks.Chunk] = []
        for chunk in chunks.decode(path.read_bytes()):
            # an observation stands before its step, and falls with it
            step = max(step, _last_step(chunk))
            if step < end:
                journal._end, journal._check = chunk.end, chunk.check
            else:
                cut.append(chunk)
        # cut before anything is appended: a chunk behind a damaged one would never be read
        os.ftruncate(journal._file, journal._end)
        for chunk in cut:
            if chunk.kind == chunks.BLOCK:  # sealed steps, of which some may be kept
                # sealed steps lie in one chunk, of which those before the cut are written anew
                complete = [record for record in records.unseal(chunk.payload) if record.step < end]
                if complete:
                    journal._write(chunks.BLOCK, records.seal(complete, with_losses=True))
            elif chunk.kind == chunks.NOTE:
                journal.note(end, json.loads(chunk.payload[_NUMBER.size :]))
        return journal

    def append(self, record: Record) -> None:
        """A step."""
        self._write(chunks.STEP, records.encode(record))

    def observation(self, step: int, observed: bytes) -> None:
        """What the subspace observed before the queries of a step."""
        self._write(chunks.OBSERVATION, _NUMBER.pack(step) + observed)

    def digest(self, step: int, sha256: str) -> None:
        """The hash of the trained weights after ``step`` steps."""
        self._write(chunks.DIGEST, _DIGEST.pack(step, bytes.fromhex(sha256)))

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """What an evaluation after ``step`` steps found."""
        self._write(chunks.EVALUATION, _NUMBER.pack(step) + json.dumps(metrics).encode())

    def note(self, step: int, note: Note) -> None:
        """Something that happened after ``step`` steps and that the steps after it depend on."""
        self._write(chunks.NOTE, _NUMBER.pack(step) + json.dumps(note).encode())

    def seal(self, *, with_losses: bool = False) -> None:
        """Write the file anew with all steps in blocks: a finished run's journal is small (see `records.seal`).

        Args:
            with_losses: keep losses and slopes, by which a guard judges the steps of a longer run.
        """
        data, check = b"", 0
        waiting: list[Record] = []

        # the whole file is made in memory, and takes the old one's place in one rename
        def put(kind: bytes, payload: bytes) -> None:
            nonlocal data, check
            encoded, check = chunks.encode(kind, payload, check)
            data += encoded

        def put_waiting() -> None:
            for first in range(0, len(waiting), records.BLOCK_STEPS):
                block = waiting[first : first + records.BLOCK_STEPS]
                put(chunks.BLOCK, records.seal(block, with_losses=with_losses))
            waiting.clear()

        for chunk in chunks.decode(self.path.read_bytes()):
            # steps in a row become a block; what stands between them keeps its place
            if chunk.kind == chunks.STEP:
                waiting.append(records.decode(chunk.payload))
            else:
                if chunk.kind == chunks.BLOCK:
                    put_waiting()
                put(chunk.kind, chunk.payload)
        put_waiting()
        with _full_disk_said(self.path, len(data)):
            write_atomically(self.path, data)
        # the lock is the file's: it has to be taken for the new one
        shared.close(self._file)
        self._file, self._check, self._end = _opened(self.path), check, len(data)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            shared.close(self._file)
            self._file = -1

    def _write(self, kind: bytes, payload: bytes) -> None:
        data, check = chunks.encode(kind, payload, self._check)
        view, at = memoryview(data), self._end
        with _full_disk_said(self.path, len(data)):
            # a write may be short; what is missing follows at its own place
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
            # On the disk before the step is written into the weights: the journal is never behind them. fdatasync
            # leaves out the times of the file, which nothing here depends on.
            getattr(os, "fdatasync", os.fsync)(self._file)
        # only now: a write that failed leaves the end where it was, and the next one begins there
        self._check, self._end = check, self._end + len(data)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _header(path: Path, chunk: chunks.Chunk) -> Header:
    if chunk.kind != chunks.HEADER:
        raise UserError(f"{path} does not begin with a header: it is not a journal of zoft")
    header = dict(json.loads(chunk.payload))
    # each field that is read later: one of another type would fail somewhere in the run
    fine = isinstance(header.get("settings", {}), dict) and "run" in header and _is_factor(header.get("lr_factor", 1.0))
    fine = fine and type(header.get("first")) is int and 0 <= header["first"] < 1 << 32
    fine = fine and isinstance(header.get("weights"), str | None)
    if header.get("format") == FORMAT and not fine:
        raise ValueError("its header does not say what the run is")
    header.setdefault("weights", None)
    # an older or newer format is no damage: it says so, and by which version it is read
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path} has journal format {header.get('format')!r}, and this zoft reads format {FORMAT}: "
            "use the version of zoft that wrote it"
        )
    return cast(Header, header)


def _take(contents: Contents, chunk: chunks.Chunk) -> None:
    kind, payload = chunk.kind, chunk.payload
    if kind == chunks.STEP:
        contents.records.append(records.decode(payload))
    elif kind == chunks.BLOCK:
        contents.records.extend(records.unseal(payload))
    elif kind == chunks.OBSERVATION:
        contents.observations[_NUMBER.unpack_from(payload)[0]] = payload[_NUMBER.size :]
    elif kind == chunks.DIGEST:
        step, sha = _DIGEST.unpack(payload)
        contents.digests[step] = sha.hex()
    elif kind == chunks.NOTE:
        contents.notes.append(cast(Note, _mapping(payload)))
        if not _is_factor(contents.notes[-1].get("lr_factor", 1.0)):
            raise ValueError("a note that makes no learning rate")
    elif kind == chunks.EVALUATION:
        contents.evaluations.setdefault(_NUMBER.unpack_from(payload)[0], []).append(_mapping(payload))
    else:
        raise ValueError("a second header")


def _mapping(payload: bytes) -> dict[str, Any]:
    """The JSON mapping behind a chunk's number of steps."""
    mapping = json.loads(payload[_NUMBER.size :])
    if not isinstance(mapping, dict):
        raise ValueError(f"a {type(mapping).__name__} where a mapping belongs")
    return mapping


def _is_factor(value: Any) -> bool:
    """Whether a value is a factor of a learning rate: above 0 and at most 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _last_step(chunk: chunks.Chunk) -> int:
    """The number of the last step that a chunk belongs to, from 0; -1 for what is before them."""
    if chunk.kind == chunks.STEP:
        return records.decode(chunk.payload).step
    if chunk.kind == chunks.BLOCK:
        return records.unseal(chunk.payload)[-1].step
    if chunk.kind == chunks.OBSERVATION:
        return int(_NUMBER.unpack_from(chunk.payload)[0])
    if chunk.kind in (chunks.DIGEST, chunks.EVALUATION, chunks.NOTE):
        # a digest, an evaluation or a note comes after its number of steps: it belongs to the step before
        return int(_NUMBER.unpack_from(chunk.payload)[0]) - 1
    return -1


# ---- writing ---------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> int:
    """The file, locked for this process as long as it is open."""
    try:
        file = shared.no_link(str(path), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    # one writer: a second run in the same folder would mix its steps into this one's
    if not shared.lock(file):
        os.close(file)
        raise UserError(f"{path} is being written by another process: wait until it ends, or choose another output_dir")
    return file


@contextmanager
def _full_disk_said(path: Path, size: int) -> Iterator[None]:
    """Within this block an error of the system, a full disk above all, becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise DiskFullError.of(error, path, size) from None
