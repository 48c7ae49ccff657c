"""The ledger: a claim is one process's, is taken over from the dead, and a row of other arguments is refused."""

import multiprocessing
import os
import socket
import time

import pytest

from zoft.bench.ledger import STALE, Ledger
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
    with ledger.claimed(CELL) as mine:
        assert mine
        assert f"process {os.getpid()}" in ledger.holder(CELL)
        with Ledger(tmp_path).claimed(CELL) as other:
            assert not other
        with ledger.claimed(Cell("sst2", "none", "mezo", 0.2, 1)) as another:  # 0.2 and 0.25 are not one file
            assert another
    assert ledger.holder(CELL) == ""
    with ledger.claimed(CELL) as mine:
        assert mine


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [
        ("process 1 on elsewhere x", 0, False),
        ("process 1 on elsewhere x", STALE + 5, True),
        (f"process {2**22 + 1} on {socket.gethostname()} x", 0, True),  # no such process here
        (f"process {os.getpid()} on {socket.gethostname()} x", 0, False),
    ],
    ids=["elsewhere", "elsewhere, old", "dead", "alive"],
)
def test_a_claim_is_taken_over_from_the_dead_only(tmp_path, holder, age, free):
    ledger = Ledger(tmp_path)
    claim = ledger._claim(CELL)
    claim.parent.mkdir(parents=True)
    claim.write_text(holder)
    os.utime(claim, (time.time() - age,) * 2)
    with ledger.claimed(CELL) as mine:
        assert mine is free
    assert claim.exists() is not free


def test_failures_are_kept_and_forgotten(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.fail(CELL, "it broke")
    assert ledger.failures() == {CELL.name: "it broke\n"}
    ledger.forget_failures()
    assert ledger.failures() == {}


def _hold(folder, found):
    with Ledger(folder).claimed(CELL) as mine:
        found.put(mine)
        time.sleep(0.5 if mine else 0)


def test_of_many_processes_one_gets_the_cell(tmp_path):
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=_hold, args=(tmp_path, found)) for _ in range(6)]
    for worker in workers:
        worker.start()
    answers = [found.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(answers) == 1
