"""`zoft tune` as a command: the arguments it takes for itself, what it prints, what it refuses, its exit codes."""

from __future__ import annotations

import json

import pytest

from tests.unit.tuning.test_jobs import BASE, FakeRun
from zoft.cli import main
from zoft.cli.tune import split

RATE = "space.optimizer.learning_rate=log(1e-4,1e-1)"


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr("zoft.tuning.job.gc.collect", lambda: None)
    fake_run = FakeRun()
    monkeypatch.setattr("zoft.run.train.run", fake_run)
    monkeypatch.setattr("zoft.lm.models.files.placed", lambda name: name)  # no job loads the model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return fake_run


@pytest.fixture
def here(monkeypatch):
    """Jobs in this process."""

    from zoft.tuning import jobs

    whole = jobs.tune_training
    monkeypatch.setattr(jobs, "tune_training", lambda *words, **given: whole(*words, **given, isolated=False))


def test_arguments_are_told_apart():
    arguments = ["config=smoke", "budget=8", "budget.queries=20", "budget=mezo", RATE, "metric=eval_accuracy", "seed=3"]
    space, settings, training = split(arguments)
    assert space == {"optimizer.learning_rate": "log(1e-4,1e-1)"}
    assert settings == {"budget": "8", "metric": "eval_accuracy"}
    assert training == ["config=smoke", "budget.queries=20", "budget=mezo", "seed=3"]


def test_it_prints_points_a_table_and_the_command(fake, here, capsys, tmp_path):
    assert main(["tune", *BASE, RATE, "budget=4", "stop_early=false"]) == 0
    printed = capsys.readouterr().out
    assert "1/4  eval_loss 0.25, the best so far" in printed
    assert "point  eval_loss" in printed
    assert "4 points went to their end, 0 were stopped at half, 0 failed" in printed
    data = json.loads((tmp_path / "runs" / "run-tune-seed0" / "results.json").read_text())
    assert printed.rstrip().endswith(data["command"])
    assert main(["tune", *BASE, RATE, "budget=5", "stop_early=false"]) == 0
    assert "resume  4 points are in the journal" in capsys.readouterr().out
    assert len(fake.seen) == 5


def test_where_most_is_choices_it_points_elsewhere(fake, here, capsys):
    choices = "space.trainer.lr_scheduler_type=choice(constant,linear,cosine)"
    assert main(["tune", *BASE, choices, "budget=1"]) == 0
    assert "search=tpe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to tune"),
        ([RATE, RATE], "given twice"),
        ([RATE, "-m"], "no flag '-m'"),
        ([RATE, "budget=0"], "budget must be a whole number >= 1, got 0"),
        ([RATE, "repeats=two"], "repeats must be a whole number"),
        ([RATE, "repeat=2"], "Did you mean repeats"),
        ([RATE, "stop_early=maybe"], "true or false"),
        ([RATE, "search=bayes"], "Known: random, tpe, zo"),
        ([RATE, "direction=down"], "Known: maximize, minimize"),
        (["space.optimizer.learning_rate=log(0,1)"], "needs both ends > 0"),
        (["space.optimizer.lr=log(1e-4,1)"], "optimizer=sgd has no 'lr'. Known: learning_rate"),
        ([RATE, "metric=accuracy"], "Did you mean eval_accuracy"),
        ([RATE, "model.nme=x"], "Did you mean name"),
    ],
)
def test_bad_input_is_one_sentence(fake, capsys, tmp_path, arguments, words):
    assert main(["tune", *BASE, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("zoft: error: ")
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert not fake.seen


def test_help_names_every_setting(capsys):
    assert main(["tune", "--help"]) == 0
    said = capsys.readouterr().out
    for setting in ("budget", "repeats", "workers", "metric", "direction", "search", "stop_early", "output_dir"):
        assert f"  {setting}=" in said
