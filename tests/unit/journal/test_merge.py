"""Merged journals: the mean of the models that they are of, their sum, and what cannot be merged, a sentence each."""

from __future__ import annotations

import dataclasses

import pytest
from safetensors.torch import load_file

from scripts import federate
from tests import runs
from zoft.cli import main
from zoft.config import compose
from zoft.errors import UserError
from zoft.journal.file import Contents, read
from zoft.journal.merge import MOST_TERMS, merge
from zoft.journal.records import COMPUTED, SKIPPED, Record
from zoft.run.train import run


def record(step, *coefficients, seed=7, lr=0.5, **fields):
    return Record(step, seed, lr, 1e-3, 2 * step + 2, 0, 0.5, 1.0, coefficients, **fields)


def journal(*records, first=0, **settings):
    given = {"optimizer": "sgd", "weight_decay": 0.0, "subspace": "full", "estimator.noise": "counter", **settings}
    return Contents({"run": "r", "first": first, "weights": "w", "frozen": "f", "settings": given}, list(records))


def merged(*journals, how="mean", **given):
    named = [(f"run{number}/journal.bin", one) for number, one in enumerate(journals)]
    return merge(named, how, lambda step: 7, **given)[1]


def test_rates_are_in_the_coefficients_and_a_direction_of_two_workers_is_one():
    one, two = journal(record(0, 2.0), record(1, 4.0)), journal(record(0, 6.0), record(1, 1.0, seed=8, lr=1.0))
    (first, second) = merged(one, two)
    assert (first.lr, first.coefficients, first.extra["directions"]) == (1.0, (0.5 * 0.5 * (2 + 6),), [[7, 0, 0]])
    assert (second.coefficients, second.extra["directions"]) == ((1.0, 0.5), [[7, 1, 0], [8, 1, 0]])
    assert [r.coefficients for r in merged(one, two, how="sum")] == [(4.0,), (2.0, 1.0)]
    assert second.queries == 8  # of both


def test_workers_need_not_keep_step_and_a_skipped_step_moves_nothing():
    long, short = journal(*(record(step, 1.0) for step in range(3))), journal(record(0, 1.0, flags=SKIPPED), record(1))
    steps = merged(long, short, how="sum")
    assert [r.coefficients for r in steps] == [(0.5,), (0.5,), (0.5,)]
    (folded,) = merged(long, short, how="sum", fold=True)
    assert folded.extra["directions"] == [[7, 0, 0], [7, 1, 0], [7, 2, 0]]


def test_a_finite_set_of_seeds_makes_as_many_coefficients():
    of_seeds = {"estimator.noise": "torch_sequential"}
    one = journal(*(record(step, 1.0, seed=step % 3) for step in range(9)), **of_seeds)
    (folded,) = merged(one, one, fold=True)
    assert dict(zip([d[0] for d in folded.extra["directions"]], folded.coefficients, strict=True)) == dict.fromkeys(
        range(3), 1.5
    )


def test_more_coefficients_than_a_record_holds_are_several_records():
    many = journal(record(0, *[1.0] * MOST_TERMS)), journal(record(0, *[1.0] * 10, seed=8))
    assert [len(r.coefficients) for r in merged(*many)] == [MOST_TERMS, 10]
    assert [r.step for r in merged(*many)] == [0, 1]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (journal(record(0, 1.0), optimizer="adam"), "optimizer=adam makes each step of those before it"),
        (journal(record(0, 1.0), weight_decay=0.1), "weight_decay=0.1 shrinks weights"),
        (journal(record(0, 1.0), subspace="low_rank", **{"subspace.interval": 50}), "subspace=low_rank keeps"),
        (
            journal(record(0, 1.0), **{"estimator.eps": 0.1}),
            "of another method than .*: estimator.eps is 0.1, and None",
        ),
        (journal(record(4, 1.0), first=4), "it begins at step 4, behind a checkpoint"),
        (journal(record(0, 1.0, flags=COMPUTED)), "some steps are made of a gradient"),
        (journal(record(0, 1.0, extra={"directions": [[7, 0, 0], [7, 0, 1]]})), "coefficients without directions"),
        (dataclasses.replace(journal(record(0, 1.0)), observations={0: b""}), "depend on what the model was seen"),
    ],
)
def test_what_cannot_be_merged_is_one_sentence(other, sentence):
    with pytest.raises(UserError, match=sentence):
        merged(journal(record(0, 1.0)), other)


@pytest.mark.parametrize(("key", "what"), [("weights", "trained"), ("frozen", "frozen")])
def test_another_base_is_refused(key, what):
    other = journal(record(0, 1.0))
    other.header[key] = "other"
    with pytest.raises(UserError, match=rf"run1/journal.bin began with other {what} weights than run0"):
        merged(journal(record(0, 1.0)), other)


def test_the_model_of_merged_runs_is_the_mean_of_their_models(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        run(
            compose(
                runs.arguments(tmp_path, folder, f"budget.queries={16 + 8 * number}", f"trainer.data_seed={number}")
            )
        )
    capsys.readouterr()
    words = ["journal", "merge", *map(str, folders), "--output", str(tmp_path / "merged")]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "the mean of 2 runs" in output
    assert "12 coefficients of the 20 that the runs have" in output  # one seed: eight steps have one direction
    assert main(["replay", str(tmp_path / "merged"), "--output", str(tmp_path / "rebuilt")]) == 0
    one, two, mean = (
        load_file(f / "model.safetensors") for f in (*(f / "model" for f in folders), tmp_path / "rebuilt")
    )
    assert max(float(((one[name] + two[name]) / 2 - mean[name]).abs().max()) for name in mean) < 1e-6
    assert max(float((one[name] - mean[name]).abs().max()) for name in mean) > 1e-4
    assert (
        main(["train", *runs.arguments(tmp_path, tmp_path / "merged", "budget.queries=16", "trainer.data_seed=0")]) == 2
    )
    capsys.readouterr()
    assert main(words) == 2
    assert "is not empty: give a new folder" in capsys.readouterr().err
    assert main([*words[:3], "--output", str(tmp_path / "new")]) == 2
    assert "give two journals or more" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "new"), "--as", "median"]) == 2
    assert "--as median: say mean" in capsys.readouterr().err
    assert main(["journal", "merge", *map(str, folders)]) == 2
    assert "say where to" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert read(tmp_path / "merged" / "journal.bin").header["merged"]["as"] == "mean"


def test_clients_of_a_finite_set_of_seeds_send_scalars(tmp_path):
    args = federate.parsed(["--clients", "2", "--rounds", "2", "--steps", "3", "--mode", "pool", "--seeds", "4"])
    for row in federate.simulate(args, tmp_path):
        assert row["off"] < 1e-5
        assert row["coefficients"] <= 4
        assert 0 < row["down"] < 2000
