"""A few rows of the fingerprint against the committed ones; `make fingerprint` compares all of them."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from functools import cache

import pytest

from tests.invariant import fingerprint, fingerprint_rows

# One a path through a step: each engine, float32 and bfloat16, an adapter, bases, anchors, hybrids, masks, moments.
CHOSEN = [
    "mezo recorded",
    "mezo fp32 in_place",
    "mezo bf16 auto",
    "lozo fp32 auto",
    "mezo_svrg fp32 auto",
    "s_mezo fp32 auto",
    "addax fp32 auto",
    "fzoo fp32 auto",
    "zo_act fp32 auto",
    "mezo_adam lora auto",
    "minimize rosenbrock",
    "minimize textbook",
    "tune zo",
    "eval zero_shot",
]


@cache
def committed():
    return fingerprint.kept(fingerprint.ASSET)


def made(pattern):
    rows = [json.loads(json.dumps(asdict(row))) for row in fingerprint_rows.make_rows([pattern])]
    return {f"{row.pop('name')}, compile never": row for row in rows}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_decides_what_it_decided_when_the_file_was_written(name, monkeypatch):
    monkeypatch.setenv("ZOFT_COMPILE", "never")
    key = f"{name}, compile never"
    assert not list(fingerprint.differences({key: committed()[key]}, made(name)))


def test_the_committed_rows_are_whole():
    rows = committed()
    assert {name.split(" ")[0] for name in rows} >= {"attack", "eval", "mezo", "minimize", "tune", "zoft"}
    assert not [name for name, row in rows.items() if row["sha"].startswith("failed")]
    assert len({row["sha"] for row in rows.values()}) > len(rows) / 2  # they tell runs apart


def test_every_preset_has_its_rows():
    missing = [name for name in fingerprint_rows.all_rows() if f"{name}, compile never" not in committed()]
    assert not missing, "make fingerprint ARGS=\"--write 'NAME *'\" adds them"


def test_what_changed_is_named():
    before = {"a, compile never": {"sha": "ab", "exact": {"queries": 8}, "near": {"losses": [4.0, 3.0]}}}

    def changes(exactly, **changed):
        now, past = copy.deepcopy(before), copy.deepcopy(before)
        now["a, compile never"] |= changed
        past["a, compile never"]["machine"] = fingerprint.machine() if exactly else "another"
        return list(fingerprint.differences(past, now))

    assert not changes(True)
    assert changes(True, sha="cd") == ["a, compile never: ab became cd (figures equal to six digits)"]
    assert not changes(False, sha="cd", near={"losses": [4.001, 3.0]})
    assert "further off" in changes(False, near={"losses": [4.0, 3.02]})[0]
    assert "further off" in changes(False, near={"losses": [4.0]})[0]
    assert "queries 8 became 9" in changes(False, exact={"queries": 9})[0]
    assert "further off" in changes(False, sha="refused UserError")[0]
    assert list(fingerprint.differences(before, {})) == ["a, compile never: is gone"]
    assert not list(fingerprint.differences({}, before))
    broken = {"b, compile never": {"sha": "failed KeyError: 'x'", "exact": {}, "near": {}}}
    assert list(fingerprint.differences({}, broken)) == ["b, compile never: failed KeyError: 'x'"]


def test_each_row_keeps_the_machine_that_made_it(tmp_path):
    rows = {name: {"sha": name, "exact": {}, "near": {}} for name in "abc"}
    fingerprint.keep(tmp_path / "rows.json", rows | {"a": rows["a"] | {"machine": "another"}})
    machines = [row["machine"] for row in fingerprint.kept(tmp_path / "rows.json").values()]
    assert machines == ["another", fingerprint.machine(), fingerprint.machine()]
