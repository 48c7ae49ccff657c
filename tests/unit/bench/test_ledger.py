"""The ledger: a claim is one process's, is taken over from the dead, and a row of other arguments is refused."""

import multiprocessing
import os
import time

import pytest

from zoft.bench.claims import STALE, machine
from zoft.bench.ledger import Ledger
from zoft.bench.plan import Cell
from zoft.errors import UserError

CELL = Cell("sst2", "none", "mezo", 0.25, 1)


def test_a_row_comes_back_and_one_of_another_bench_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.row(CELL, ["a=1"]) is None
    assert not ledger.has(CELL)
    ledger.write(CELL, {"identity": ["a=1"], "curve": [1.5]})
    assert ledger.row(CELL, ["a=1"]) == {"identity": ["a=1"], "curve": [1.5]}
    assert ledger.has(CELL)
    assert ledger.number_of_rows() == 1
    with pytest.raises(
        UserError, match=r"holds another bench: sst2/none/mezo-x0.25-seed1 was run with a=1 and is now a=2"
    ):
        ledger.row(CELL, ["a=2"])


def test_a_claim_is_held_by_one_and_let_go(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.claimed(CELL) as claim:
        assert claim
        assert f"process {os.getpid()}" in ledger.holder(CELL)
        with Ledger(tmp_path).claimed(CELL) as other:
            assert not other
        with ledger.claimed(Cell("sst2", "none", "mezo", 0.2, 1)) as another:  # 0.2 and 0.25 are not one file
            assert another
    assert ledger.holder(CELL) == ""
    with ledger.claimed(CELL) as claim:
        assert claim


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [
        ("process 1 on elsewhere x", 0, False),
        ("process 1 on elsewhere x", STALE + 5, True),
        (f"process {2**22 + 1} on {machine()} x", 0, True),  # no such process here
        (f"process {os.getpid()} on {machine()} x", 0, False),
    ],
    ids=["elsewhere", "elsewhere, old", "dead", "alive"],
)
def test_a_claim_is_taken_over_from_the_dead_only(tmp_path, holder, age, free):
    ledger = Ledger(tmp_path)
    claim = ledger._claim(CELL)
    claim.parent.mkdir(parents=True)
    claim.write_text(holder)
    os.utime(claim, (time.time() - age,) * 2)
    with ledger.claimed(CELL) as own_claim:
        assert (own_claim is not None) is free
    assert claim.exists() is not free


def test_failures_are_kept_and_forgotten(tmp_path):
    ledger = Ledger(tmp_path)
    other = Cell("sst2", "none", "fzoo", 0.25, 1)
    ledger.fail(CELL, "it broke")
    ledger.fail(other, "it broke too")
    assert ledger.failures([CELL]) == {CELL: "it broke\n"}
    ledger.forget_failures([CELL])
    assert ledger.failures([CELL, other]) == {other: "it broke too\n"}


def test_who_was_suspended_finds_its_claim_gone(tmp_path):
    """Its claim grew old and somebody has it now: it neither lets go of that nor believes it is its own."""
    ledger = Ledger(tmp_path)
    with ledger.claimed(CELL) as first:
        os.utime(first.path, (time.time() - STALE - 5,) * 2)
        with ledger.claimed(CELL) as second:
            assert second.is_ours()
            assert not first.is_ours()
    assert not first.path.exists()


def test_of_two_who_take_over_the_later_gives_back(tmp_path, monkeypatch):
    """Both saw the dead one's claim; the first has made its own by the time the second moves the file."""
    from zoft.bench import claims

    ledger = Ledger(tmp_path)
    path = ledger._claim(CELL)
    path.parent.mkdir(parents=True)
    path.write_text("process 1 on elsewhere dead")
    os.utime(path, (time.time() - STALE - 5,) * 2)

    def dead(path, text, real=claims._is_dead):
        answer = real(path, text)
        path.unlink()
        path.write_text("process 2 on elsewhere alive")
        return answer

    monkeypatch.setattr(claims, "_is_dead", dead)
    with ledger.claimed(CELL) as claim:
        assert claim is None
    assert path.read_text() == "process 2 on elsewhere alive"


def _hold(folder, queue, all_have_asked):
    with Ledger(folder).claimed(CELL) as claim:
        queue.put(claim is not None)
        if claim:  # however late the last of them starts
            all_have_asked.wait(60)


def test_of_many_processes_one_gets_the_cell(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, all_have_asked = context.Queue(), context.Event()
    workers = [context.Process(target=_hold, args=(tmp_path, queue, all_have_asked)) for _ in range(6)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=30) for _ in workers]
    all_have_asked.set()
    for worker in workers:
        worker.join()
    assert sum(answers) == 1
