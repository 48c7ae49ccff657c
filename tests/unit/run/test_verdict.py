"""What a run says at its end: the paired gain, the next commands, and what went wrong on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.runs import arguments
from zoft.cli import main
from zoft.config import compose
from zoft.errors import NonFiniteLossError
from zoft.report.health import HealthCallback, warn_unmoved
from zoft.report.text import fact_rows
from zoft.run.train import run
from zoft.run.verdict import next_lines, paired_gain, row_values, verdict_line


def test_a_paired_interval_is_narrower_where_rows_go_together():
    generator = numpy.random.default_rng(0)
    before = generator.random(400) < 0.5
    after = before | (generator.random(400) < 0.1)  # none is lost: pairs know it
    rows = [{"values": values.astype(float).tolist(), "weights": [1.0] * 400} for values in (before, after)]
    gain = paired_gain("accuracy", *rows)
    assert gain is not None
    middle, low, high = gain
    assert middle == pytest.approx(after.mean() - before.mean())
    assert 0 < low < middle < high
    assert high - low < 0.06  # apart, two accuracies of 400 rows have intervals of 0.1 each


def test_a_loss_is_paired_by_tokens():
    one = row_values("loss", numpy.array([4.0, 9.0]), numpy.array([2, 3]))
    two = row_values("loss", numpy.array([2.1, 5.9]), numpy.array([2, 3]))
    gain = paired_gain("loss", one, two)
    assert gain is not None
    assert gain[0] == pytest.approx(-1)  # 5 tokens, 5 nats
    assert gain[1] < -1 < gain[2]
    assert verdict_line("accuracy", (-0.2, -0.3, -0.1), 9).endswith("WORSE than before")
    assert paired_gain("loss", one, row_values("loss", numpy.array([2.0, 6.0]), numpy.array([3, 2]))) is None


def test_rows_that_all_changed_alike_have_a_bound_from_their_number():
    rows = [{"values": [value] * 20, "weights": [1.0] * 20} for value in (0.0, 1.0)]
    share = 1 - 0.05 ** (1 / 20)  # 14 %: 20 rows say no more of the others
    assert paired_gain("accuracy", *rows) == pytest.approx((1, 1 - 2 * share, 1))
    assert paired_gain("accuracy", rows[0], rows[0]) == pytest.approx((0, -share, share))
    gain = paired_gain("reward", *rows)
    assert gain == (1, -math.inf, math.inf)
    line = verdict_line("reward", gain, 20)
    assert line == "verdict   +1.000 on the same 20 rows, each by as much: no interval can be told from that"
    known = {"metric": "reward", "gain": 1.0, "gain_interval": gain[1:]}
    assert dict(fact_rows(known))["paired gain"] == "+1.000 on the same rows"
    line = verdict_line("loss", (0.0, -math.inf, math.inf), 9)
    assert line.startswith("verdict   +0.000 on the same 9 rows, none of which changed")


def test_few_rows_take_students_t():
    before = {"values": [0.0] * 8, "weights": [1.0] * 8}
    after = {"values": [1.0] * 3 + [0.0] * 5, "weights": [1.0] * 8}
    gain = paired_gain("accuracy", before, after)
    assert gain is not None
    assert gain[1] < 0  # three rows of eight can be luck (McNemar's exact test: p = 0.25)


def test_a_run_ends_with_verdict_and_next_commands(tmp_path: Path, capsys: Any):
    words = arguments(tmp_path, tmp_path / "out")
    facts = run(compose(words))
    said = capsys.readouterr().out
    assert "verdict   " in said
    assert f"next    zoft predict run={tmp_path / 'out'} data=new.csv" in said
    assert sum(f"zoft {verb} " in said for verb in ("predict", "export", "journal show")) == 3
    low, high = facts["gain_interval"]
    assert low <= facts["gain"] <= high
    assert facts["gain"] == pytest.approx(facts["final"] - facts["zero_shot"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gain"] == facts["gain"]
    assert "| paired gain |" in (tmp_path / "out" / "report.md").read_text()


def test_next_commands_follow_from_the_rows():
    assert "zoft chat run=r --compare" in next_lines("r", chats=True, chooses=False)[0]
    assert "zoft generate run=r" in next_lines("r", chats=False, chooses=False)[0]


class State:
    is_world_process_zero = True
    max_steps = 100
    global_step = 30


class Args:
    learning_rate = 0.1


def watched(logs: list[dict[str, float]], caplog: Any, chance: float | None = 0.5) -> list[str]:
    callback: Any = HealthCallback(chance, 100, eps=1e-9)
    with caplog.at_level(logging.WARNING, logger="zoft"):
        for row in logs:
            callback.on_log(Args(), State(), None, row)
    return [record.getMessage() for record in caplog.records]


def test_a_ruined_run_is_said_once(caplog: Any):
    (said,) = watched([{"loss": 10.8}, {"loss": 11.0}, {"loss": 8.7e8}, {"loss": 9e8}], caplog)
    assert said.startswith("the loss went from 10.8 to 8.7e+08: the run is ruined")
    assert "optimizer.learning_rate=0.01" in said


def test_steps_without_a_finite_loss_ruin_a_run_too(caplog: Any):
    (said,) = watched([{"loss": 0.7, "num_skipped_steps": 27}, {"eval_accuracy": 0.5}], caplog)
    assert said.startswith("the loss was no finite number in 27 of 30 steps: the run is ruined")
    caplog.clear()
    assert watched([{"loss": 0.7, "num_skipped_steps": 2}], caplog) == []  # here and there: the guard's matter


def test_a_run_that_its_first_step_has_ruined_says_so(caplog: Any):
    """The untrained model's loss is what a loss is compared with, and slopes that are gone are no matter of eps."""
    flat = {"loss": 0.693, "projected_grad": 0.0}
    said = []
    for rows, first, sloped in (([{"loss": 739.0}], 0.76, 0), ([{"eval_loss": 739.0}], 0.76, 0), ([flat], None, 1)):
        callback: Any = HealthCallback(0.5, 100, eps=1e-3, usual=1e-3)
        callback.first, callback.sloped = first, sloped
        args = Args()
        args.learning_rate = 1e9
        with caplog.at_level(logging.WARNING, logger="zoft"):
            for row in [*rows, {"eval_accuracy": 0.5}]:
                callback.on_log(args, State(), None, row)
        said.append(caplog.messages)
        caplog.clear()
    assert [len(one) for one in said] == [1, 1, 1]
    assert all("the run is ruined" in text and text.endswith("optimizer.learning_rate=0.001") for (text,) in said)
    callback = HealthCallback(0.5, 100, eps=1e-3, usual=1e-3)
    callback.sloped = 1  # of an accuracy that did not jump at a usual rate
    callback.on_log(Args(), State(), None, flat)
    assert not caplog.messages


def test_slopes_that_are_all_zero_are_said(caplog: Any):
    (said,) = watched([{"loss": 0.7, "projected_grad": 0.0}, {"eval_accuracy": 0.5}], caplog)
    assert "estimator.eps=1e-09 is too small for what they resolve" in said
    assert "try estimator.eps=1e-08" in said
    caplog.clear()
    assert watched([{"loss": 0.7, "projected_grad": 500.0}, {"loss": 0.7, "projected_grad": 0.0}], caplog) == []


def test_chance_level_is_said_once_and_a_learning_run_is_not(caplog: Any):
    (said,) = watched([{"eval_accuracy": 0.52}, {"eval_accuracy": 0.5}], caplog)
    assert "cannot be told from guessing (50.0 %)" in said
    caplog.clear()
    assert watched([{"eval_accuracy": 0.8}, {"loss": 1.0}, {"loss": 2.0}], caplog) == []
    assert watched([{"eval_accuracy": 0.5}], caplog, chance=None) == []


def test_below_chance_is_said_too_with_what_makes_a_difference(caplog: Any):
    callback: Any = HealthCallback(0.5, 100, more_of="", usual=0.1, bounded=True, has_adapter=True)
    callback.on_log(Args(), State(), None, {"eval_accuracy": 0.3})
    (said,) = caplog.messages
    assert said.endswith("or is below it: try another learning rate (optimizer.learning_rate=0.0333)")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["method=mezo"], "estimator.num_directions"),
        (["method=adamw"], ""),
        (["method=nodes"], "estimator.num_directions"),
        (["method=zoft", "estimator.response=learnt"], "estimator.first"),
        (["method=zoft", "estimator.response=identity"], ""),
        (["method=zoft", "estimator.feedback=exact"], ""),
    ],
)
def test_more_directions_are_named_only_where_a_step_asks_for_some(words: list[str], named: str, caplog: Any):
    from types import SimpleNamespace

    from zoft.config import compose
    from zoft.run.facts import more_of

    cfg = compose(["task=sst2", *words])
    trainer: Any = SimpleNamespace(method=SimpleNamespace(estimator=cfg.estimator))
    assert more_of(cfg, trainer) == named
    callback: Any = HealthCallback(0.5, 100, more_of=named)
    with caplog.at_level(logging.WARNING, logger="zoft"):
        callback.on_log(Args(), State(), None, {"eval_accuracy": 0.5})
    assert ("more estimator" in caplog.text) is bool(named)
    assert named in caplog.text
    assert "fewer trained weights" in caplog.text


def test_weights_that_do_not_move_are_said(caplog: Any):
    with caplog.at_level(logging.WARNING, logger="zoft"):
        weights = torch.linspace(-1, 1, 1000)
        warn_unmoved(weights, weights + torch.eye(1000)[:20].sum(0), 10, 1e-9)  # 2 % have changed
        warn_unmoved(weights, weights + torch.eye(1000)[0], 10, 1e-9, partial=True)
        assert not caplog.records
        warn_unmoved(weights, weights, 10, 1e-9)
        warn_unmoved(weights, weights + torch.eye(1000)[0], 10, 1e-9)
    assert "99.9 % of the weights have not changed in 10 steps" in caplog.text
    assert "no weight has changed in 10 steps" in caplog.text
    assert len(caplog.records) == 2
    with caplog.at_level(logging.WARNING, logger="zoft"):
        warn_unmoved(weights, weights, 1, 1e-2, flat=True)  # a reward that every text got: no rate would move them
    assert "no weight has changed in 1 step: all points of the last step had the same loss" in caplog.text


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.learning_rate=1e-30", "no weight has changed in 12 steps"),
        ("optimizer.learning_rate=2e-12", "% of the weights have not changed in 12 steps"),
        ("estimator.eps=8e-9", "estimator.eps=8e-09 is too small for what they resolve"),
        ("optimizer.learning_rate=1e12", "the run is ruined"),
    ],
)
def test_a_run_that_cannot_learn_says_what_to_change(tmp_path: Path, caplog: Any, setting: str, said: str):
    """As whole runs: a model has zeros (padding, biases), norms of size 1, and losses that overflow."""
    cfg = compose(arguments(tmp_path, tmp_path / "out", "trainable=all", "trainer.logging_steps=1", setting))
    # ten steps without a loss end a run
    with caplog.at_level(logging.WARNING, logger="zoft"), contextlib.suppress(NonFiniteLossError):
        run(cfg)
    assert said in caplog.text, caplog.text
    assert "load the weights in float32" not in caplog.text  # they are


def test_a_run_at_an_absurd_rate_says_that_it_is_ruined(tmp_path: Path, caplog: Any):
    """The tiny model's answers become equally likely, whatever the text."""
    with caplog.at_level(logging.WARNING, logger="zoft"):
        run(compose(arguments(tmp_path, tmp_path / "out", "optimizer.learning_rate=1e4", "trainer.logging_steps=1")))
    assert "have been equal since step 1: the run is ruined" in caplog.text
    assert "optimizer.learning_rate=1e-05" in caplog.text


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("trainer", ["trainer.logging_steps=10   (float)", "trainer.guard='none'   (str)"]),
        ("precision", ["precision.update='auto'   (str)"]),
        ("budget", ["budget.queries=2000   (int)", "mezo"]),
        ("tracker", ["tracker.project='zoft'   (str)"]),
        ("diagnostics", ["diagnostics.every=0   (int)"]),
        ("model", ["model.dtype='float32'   (str)", "smollm2_demo"]),
    ],
)
def test_every_section_can_be_shown(name: str, keys: list[str], capsys: Any):
    assert main(["show", name]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in keys), said[:2000]
    if name == "trainer":
        assert "trainer.learning_rate" not in said  # it has another home
        assert "Log every X updates steps" in said
