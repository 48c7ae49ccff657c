"""What a run chooses by itself: by its own queries, from the same weights, and once in its life."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import arguments, report
from zoft.cli import main
from zoft.config import compose, resolved_yaml
from zoft.errors import UserError
from zoft.run import auto
from zoft.run.train import run

RATE = "optimizer.learning_rate=auto"


def words_of(folder: Path, *more: str) -> list[str]:
    """A run of 200 queries."""
    names = [word.partition("=")[0] for word in more]
    defaults = [word for word in arguments(folder, folder / "out", "budget.queries=200") if word != "budget.queries=24"]
    return [*(word for word in defaults if word.partition("=")[0] not in names), *more]


def test_the_word_in_arguments_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(["config=smoke", RATE, "estimator.eps=auto"])
    assert cfg.auto == ["optimizer.learning_rate", "estimator.eps"]
    assert cfg.optimizer.learning_rate == 0.03  # where the search begins
    Path("kept.yaml").write_text(resolved_yaml(cfg))
    assert compose(["config=kept.yaml"]) == cfg
    assert "auto" not in resolved_yaml(["config=smoke"]).replace(": auto", "")  # as earlier runs have it
    Path("mine.yaml").write_text("# @package _global_\noptimizer:\n  learning_rate: auto\n")
    assert compose(["config=mine.yaml"]).auto == ["optimizer.learning_rate"]
    assert compose(["config=mine.yaml", "optimizer.learning_rate=1e-3"]).auto == []
    with pytest.raises(UserError, match=r"optimizer.beta=auto: optimizer.beta must be a number"):
        compose(["config=smoke", "optimizer=momentum", "optimizer.beta=auto"])
    with pytest.raises(UserError, match=r"estimator.eps=auto: estimator=forward_gradient has no eps"):
        compose(["config=smoke", "estimator=forward_gradient", "estimator.eps=auto"])


@pytest.mark.parametrize(("best", "trials"), [(1.0, 3), (300.0, 6), (1e-2, 6)])
def test_the_climb_ends_at_the_best_rung(best: float, trials: int):
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(rate / best - best / rate)

    chosen = auto.climb(1.0, loss, lambda: len(asked) < auto.MOST_TRIALS)
    assert len(asked) == trials
    assert chosen == min(asked, key=lambda rate: abs(rate / best - best / rate))


def test_the_climb_leaves_rates_that_move_nothing_by_larger_steps(caplog: pytest.LogCaptureFixture):
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return 0.7 - min(rate, 0.5)

    assert auto.climb(1e-6, loss, lambda: len(asked) < auto.MOST_TRIALS) == max(asked) == 1e-6 * 4**7
    assert not caplog.records
    chosen = auto.climb(1e-9, loss, lambda: len(asked) < 8)  # two trials more are paid for
    assert chosen == max(asked[6:]) == 4e-9
    assert (
        "no learning rate from 1e-09 to 4e-09 changed the loss in trials this short: the choice is a guess"
        in caplog.text
    )


def test_rates_that_a_bound_makes_alike_are_not_said_to_change_nothing(caplog: pytest.LogCaptureFixture):
    asked: list[float] = []
    assert auto.climb(4.0, lambda rate: asked.append(rate) or (0.39 if rate else 0.78), lambda: len(asked) < 4) == 4.0
    assert caplog.messages == ["every learning rate from 4 to 4.1e+03 ends at the same loss: the lowest does"]


def test_the_climb_goes_down_out_of_ruin():
    assert auto.climb(1.0, lambda rate: float("inf") if rate > 0.1 else abs(rate - 0.05), lambda: True) == 1 / 16


def test_q_follows_from_the_method():
    q = [compose(["config=smoke", "estimator.num_directions=auto", *more]) for more in (["optimizer=sgd"], [])]
    assert [auto.num_directions(cfg) for cfg in q] == [1, 10]
    assert (
        auto.num_directions(
            compose(["config=smoke", "optimizer=sgd", "estimator.across=antithetic", "estimator.num_directions=4"])
        )
        == 2
    )


def test_a_run_chooses_once_and_goes_on_with_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    words = words_of(tmp_path, RATE, "estimator.eps=auto", "estimator.num_directions=auto")
    assert main(["train", *words]) == 0
    output = capsys.readouterr().out
    choice = json.loads((tmp_path / "out" / auto.NAME).read_text())
    assert f"auto    estimator.num_directions=1, estimator.eps={choice['values']['estimator.eps']:g}" in output
    # 3 directions at 5 radii and at the first rate; a trial is 4 queries of training and 2 batches of dev rows
    assert choice["queries"] == 2 * 3 * 5 + 2 * 3 + 6 * len(choice["trials"])
    assert len(choice["trials"]) == 2
    facts = report(tmp_path / "out")
    assert facts["learning_rate"] == choice["values"]["optimizer.learning_rate"]
    assert facts["num_queries"] <= 200
    assert facts["num_steps"] == (200 - choice["queries"]) // 2
    with (tmp_path / "out" / "metrics.csv").open() as file:
        queries = [int(row["queries"]) for row in csv.DictReader(file)]
    assert min(queries) >= choice["queries"]  # the search is part of what was spent

    assert main(["replay", str(tmp_path / "out")]) == 0
    assert facts["weights_sha256"] in capsys.readouterr().out
    for name in ("report.json", "report.md"):  # the run was killed before its end
        (tmp_path / "out" / name).unlink()
    monkeypatch.setattr(auto, "climb", None)  # nothing is searched again
    again = run(compose(words))
    assert {key: again[key] for key in ("weights_sha256", "num_queries")} == {
        key: facts[key] for key in ("weights_sha256", "num_queries")
    }


def test_too_few_queries_for_a_search(tmp_path: Path):
    cfg = compose(words_of(tmp_path, RATE, "budget.queries=24"))
    with pytest.raises(UserError, match=r"too few for that .* raise the budget, or give a learning rate"):
        run(cfg)
    assert not (tmp_path / "out").exists()


def test_a_choice_that_takes_the_whole_budget_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"eps=auto takes \d+ queries: raise budget.queries, or give a value"):
        run(compose(words_of(tmp_path, "estimator.eps=auto", "budget.queries=24")))


def test_a_plateau_needs_losses_that_move():
    with pytest.raises(UserError, match="no loss moves"):
        auto.plateau({1e-3: [0.0], 1e-2: [0.0]})
