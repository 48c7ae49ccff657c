"""The journal file: what is written is read again, and what is cut or changed is noticed."""

from __future__ import annotations

import math
import random
import struct
import zlib

import pytest

from zoft.errors import UserError
from zoft.journal import chunks, records
from zoft.journal.file import NAME, Journal, read
from zoft.journal.records import Record


def single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def record(step: int, **given) -> Record:
    drawn = random.Random(step)
    values = {"loss": drawn.random(), "slope": drawn.random(), "coefficients": (single(drawn.gauss(0, 1)),)}
    return Record(step, 7, 1e-6, 1e-3, 2 * (step + 1), 64 * (step + 1), **(values | given))


def written(path, count: int = 5, **given) -> Journal:
    journal = Journal.create(path, {"weights": "ab", "settings": {"seed": 7}})
    for step in range(count):
        journal.append(record(step, **given))
    return journal


def test_what_is_written_is_read(tmp_path):
    journal = written(tmp_path / NAME)
    journal.observation(5, b"seen")
    journal.append(record(5, extra={"scalars": {"estimator": {"losses": [1.5]}}}, flags=records.SKIPPED))
    journal.digest(6, "cd" * 32)
    journal.evaluation(6, {"eval_loss": 0.1})
    journal.note(6, {"lr_factor": 0.5})
    journal.close()
    contents = read(tmp_path / NAME)
    assert contents.records[:5] == [record(step) for step in range(5)]
    assert contents.records[5].skipped
    assert contents.records[5].extra == {"scalars": {"estimator": {"losses": [1.5]}}}
    assert (contents.observations, contents.digests) == ({5: b"seen"}, {6: "cd" * 32})
    assert (contents.evaluations, contents.notes) == ({6: [{"eval_loss": 0.1}]}, [{"lr_factor": 0.5}])
    assert (contents.end, contents.damaged) == (6, 0)


def test_cut_at_any_byte_at_most_the_last_step_is_lost(tmp_path):
    written(tmp_path / NAME).close()
    whole = (tmp_path / NAME).read_bytes()
    last = len(chunks.encode(chunks.STEP, records.encode(record(4)), 0)[0])
    for num_bytes in range(len(whole) - last, len(whole)):
        (tmp_path / NAME).write_bytes(whole[:num_bytes])
        assert read(tmp_path / NAME).end == 4
        journal = Journal.open(tmp_path / NAME, 100)
        journal.append(record(4))
        journal.close()
        assert (tmp_path / NAME).read_bytes() == whole


def test_every_flipped_bit_is_noticed(tmp_path):
    written(tmp_path / NAME).close()
    whole = (tmp_path / NAME).read_bytes()
    for _, at in zip(range(200), random.Random(0).sample(range(8 * len(whole)), 200), strict=True):
        changed = bytearray(whole)
        changed[at // 8] ^= 1 << at % 8
        (tmp_path / NAME).write_bytes(changed)
        try:
            contents = read(tmp_path / NAME)
        except UserError:
            continue
        assert contents.damaged
        assert contents.records == [record(step) for step in range(contents.end)]


def test_open_cuts_off_what_comes_after(tmp_path):
    journal = written(tmp_path / NAME)
    journal.digest(5, "cd" * 32)
    journal.close()
    Journal.open(tmp_path / NAME, 3).close()
    contents = read(tmp_path / NAME)
    assert (contents.end, contents.digests) == (3, {})


def test_twenty_thousand_steps_are_less_than_a_tenth_of_a_megabyte(tmp_path):
    steps = [record(step) for step in range(20_000)]
    blocks = [records.seal(steps[i : i + records.BLOCK_STEPS]) for i in range(0, len(steps), records.BLOCK_STEPS)]
    assert sum(map(len, blocks)) < 90_000
    again = [one for block in blocks for one in records.unseal(block)]
    fields = ("step", "seed", "lr", "eps", "queries", "coefficients", "curvatures", "flags")
    assert all(getattr(a, name) == getattr(b, name) for a, b in zip(steps, again, strict=True) for name in fields)
    assert math.isnan(again[3].loss)


def test_a_sealed_journal_goes_on(tmp_path):
    journal = written(tmp_path / NAME, extra={"scalars": {"weighting": {"variance": 0.5}}})
    journal.evaluation(5, {"eval_loss": 0.25})
    journal.seal()
    journal.append(record(5))
    journal.close()
    contents = read(tmp_path / NAME)
    assert (contents.end, contents.damaged, contents.evaluations) == (6, 0, {5: [{"eval_loss": 0.25}]})
    assert contents.records[4].extra == {"scalars": {"weighting": {"variance": 0.5}}}
    assert contents.records[5] == record(5)


def test_coefficients_that_need_it_stay_double(tmp_path):
    steps = [record(step, coefficients=(0.1, 0.2), curvatures=(1e-3,)) for step in range(3)]
    assert [one.coefficients for one in records.unseal(records.seal(steps))] == [(0.1, 0.2)] * 3


@pytest.mark.parametrize("content", [b"", b"not a journal", chunks.encode(chunks.STEP, b"", 0)[0]])
def test_what_is_no_journal_is_said(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(UserError, match="journal"):
        read(tmp_path / NAME)


def test_another_format_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(chunks.encode(chunks.HEADER, b'{"format": 2}', 0)[0])
    with pytest.raises(UserError, match="has journal format 2"):
        read(tmp_path / NAME)


def test_two_processes_do_not_write_one_journal(tmp_path):
    journal = written(tmp_path / NAME)
    with pytest.raises(UserError, match="being written by another process"):
        Journal.open(tmp_path / NAME, 1)
    journal.close()


def test_a_block_cannot_fill_the_memory(monkeypatch):
    monkeypatch.setattr(records, "_LARGEST", 1000)
    with pytest.raises(UserError, match="was not written by zoft"):
        records.unseal(zlib.compress(bytes(1001)))
