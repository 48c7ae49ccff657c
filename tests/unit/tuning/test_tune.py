"""zoft.tune: ranges and how they are rounded, the search, its journal, its workers, what is refused."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import zoft
from zoft.errors import UserError
from zoft.tuning.evaluation import Job, JobOutcome
from zoft.tuning.sampler import ZOSampler
from zoft.tuning.settings import NAME, SEARCHES
from zoft.tuning.space import SearchSpace, key, parsed, text_of
from zoft.tuning.workers import Workers

SPACE = {"rate": "log(1e-5,1)", "width": "int(1,8)", "kind": "choice(a,b,c)", "drop": "uniform(0,0.5)"}


def bowl(point):
    """Lowest, at 0, for rate 1e-3, width 3, kind b, drop 0.1."""
    far = (math.log10(point["rate"]) + 3) ** 2 + (point["width"] - 3) ** 2 / 4 + 20 * (point["drop"] - 0.1) ** 2
    return far + (point["kind"] != "b")


class Counted:
    def __init__(self, f=bowl):
        self.f, self.asked = f, []

    def __call__(self, point):
        self.asked.append(point)
        return self.f(point)


# ------------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("text", "at_ends", "at_middle"),
    [
        ("log(1e-4,1e-2)", [1e-4, 1e-2], 1e-3),
        ("uniform(-1,3)", [-1.0, 3.0], 1.0),
        ("int(1,3)", [1, 3], 2),
        ("logint(1,64)", [1, 64], 6),
        ("choice(true,null,2,x)", [True, None, 2, "x"], True),
        ("choice([1,2],[3,4])", ["[1,2]", "[3,4]"], "[1,2]"),
    ],
)
def test_ranges(text, at_ends, at_middle):
    distribution = parsed("p", text)
    parameter = SearchSpace({"p": text}).parameters["p"]
    assert parameter.ends == at_ends
    assert parameter.value([0.5] * parameter.width) == at_middle
    for value in at_ends:  # a value's own place gives it back
        assert parameter.value(parameter.units(value)) == value
    assert parsed("p", text_of(distribution)) == distribution
    assert parameter.units("elsewhere") is None


def test_whole_numbers_have_equal_shares():
    grid = [(i + 0.5) / 1000 for i in range(1000)]

    def values(text):
        return [SearchSpace({"p": text}).values([u])["p"] for u in grid]

    assert [values("int(1,4)").count(k) for k in (1, 2, 3, 4)] == [250] * 4
    logs = values("logint(1,8)")
    assert sorted(set(logs)) == list(range(1, 9))
    assert logs.count(1) > logs.count(2) > logs.count(8)
    halves = values("choice(a,b)")
    assert halves.count("a") == halves.count("b")


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "the space is empty"),
        ({"p": "log(1,1)"}, "the lower end must be below the upper one"),
        ({"p": "uniform(2,1)"}, "the lower end must be below the upper one"),
        ({"p": "log(0,1)"}, "needs both ends > 0; uniform"),
        ({"p": "log(-1,1)"}, "needs both ends > 0"),
        ({"p": "uniform(0,inf)"}, "finite"),
        ({"p": "int(1,2.5)"}, "whole numbers"),
        ({"p": "logint(0,4)"}, "needs both ends > 0; int"),
        ({"p": "choice()"}, "two options or more"),
        ({"p": "choice(a)"}, "p=..."),
        ({"p": "choice(a,b,a)"}, "twice"),
        ({"p": "lgo(1,2)"}, "Did you mean log"),
        ({"p": "log(1)"}, "two numbers"),
        ({"p": "log(a,b)"}, "two numbers"),
        ({"p": "1e-3"}, "write log(1e-5,1e-1)"),
    ],
)
def test_a_space_that_holds_nothing_is_refused(space, words):
    f = Counted()
    with pytest.raises(UserError) as caught:
        zoft.tune(f, space, budget=4)
    assert words in str(caught.value)
    assert not f.asked


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": 0}, "budget must be a whole number >= 1"),
        ({"budget": 2, "repeats": 3}, "pay for no point of repeats=3"),
        ({"workers": 0}, "workers must be"),
        ({"search": "tpee"}, "Did you mean tpe"),
        ({"direction": "max"}, "no direction called 'max'"),
        ({"seed": -1}, "seed must be"),
        ({"x0": {"rte": 1}}, "Did you mean rate"),
        ({"x0": {"rate": 2.0}}, "which is not in log(1e-05,1)"),
        ({"workers": 2}, "cannot be sent"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, words):
    f = Counted(lambda point: 0.0)
    with pytest.raises(UserError) as caught:
        zoft.tune(f, SPACE, **{"budget": 4, **given})
    assert words in str(caught.value)
    assert not f.asked


# ------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_finds_its_way(search):
    f = Counted()
    result = zoft.tune(f, SPACE, budget=60, search=search, seed=1)
    assert result.num_evaluations == len(f.asked) == 60
    assert len({json.dumps(point) for point in f.asked}) == 60  # nothing is asked twice
    assert result.fun == bowl(result.x) == min(map(bowl, f.asked)) < {"random": 1.3}.get(search, 0.9)
    again = zoft.tune(bowl, SPACE, budget=60, search=search, seed=1)
    assert [e.values for e in again.evaluations] == f.asked
    assert zoft.tune(bowl, SPACE, budget=60, search=search, seed=2).evaluations != result.evaluations


def test_the_zeroth_order_search_beats_random_on_a_bowl():
    space = {name: SPACE[name] for name in ("rate", "drop")}

    def lowest(search):
        runs = [
            zoft.tune(lambda p: bowl({**p, "width": 3, "kind": "b"}), space, budget=40, search=search, seed=seed)
            for seed in range(5)
        ]
        return sorted(run.fun for run in runs)[2]

    assert lowest("zo") < lowest("random") / 2


def test_it_begins_where_it_is_told_and_goes_up_where_that_is_wanted():
    f = Counted(lambda point: -bowl(point))
    result = zoft.tune(f, SPACE, budget=8, x0={"rate": 0.5, "kind": "c"}, direction="maximize")
    assert f.asked[0] == {"rate": 0.5, "width": 5, "kind": "c", "drop": 0.25}
    assert result.fun == max(map(f.f, f.asked))
    assert result.table().splitlines()[0].split() == ["point", "value", *SPACE]


def test_a_small_space_is_known_after_a_while():
    f = Counted(lambda point: point["a"] * point["b"])
    result = zoft.tune(f, {"a": "int(1,4)", "b": "choice(1,2,3)"}, budget=400)
    assert len(f.asked) == 12
    assert result.x == {"a": 1, "b": 1}
    assert "Every point" in result.message


def test_repeats_are_averaged_and_counted():
    values = iter(range(100))
    result = zoft.tune(lambda point: float(next(values)), {"a": "uniform(0,1)"}, budget=9, repeats=2)
    assert result.num_evaluations == 8
    assert [e.value for e in result.evaluations] == [0.5, 2.5, 4.5, 6.5]
    assert result.best.spread == pytest.approx(0.5)


def test_failures_are_counted_and_the_search_goes_round_them():
    def f(point):
        if point["rate"] > 3e-3:
            raise RuntimeError("diverged")
        return math.nan if point["width"] > 6 else bowl(point)

    result = zoft.tune(f, SPACE, budget=40)
    errors = {e.error for e in result.failed}
    assert "RuntimeError: diverged" in errors
    assert result.failed[0].values["rate"] > 3e-3
    assert math.isnan(result.failed[0].value)
    assert len(result.failed) + len(result.ranked) == 40
    assert result.fun < 1.5
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["num_failed"] == len(result.failed)


def test_a_function_that_fails_everywhere_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"first 4 points all failed, the first at rate=.*ZeroDivisionError"):
        zoft.tune(lambda point: 1 / 0, SPACE, budget=40)


# ------------------------------------------------------------------------------------------------------------ journal


@pytest.mark.parametrize("search", ["zo", "tpe"])
def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path, search):
    whole = zoft.tune(bowl, SPACE, budget=20, search=search)
    f = Counted()

    def killed(point):
        if len(f.asked) == 9:
            raise KeyboardInterrupt
        return f(point)

    with pytest.raises(KeyboardInterrupt):
        zoft.tune(killed, SPACE, budget=20, search=search, output_dir=tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"number": 9, "rep')  # cut off while it was written
    again = zoft.tune(f, SPACE, budget=20, search=search, output_dir=tmp_path)
    assert again.num_resumed == 9
    assert len(f.asked) == 20
    assert [(e.values, e.value) for e in again.evaluations] == [(e.values, e.value) for e in whole.evaluations]
    zoft.tune(f, SPACE, budget=20, search=search, output_dir=tmp_path)
    assert len(f.asked) == 20  # a finished one is looked up
    more = zoft.tune(f, SPACE, budget=23, search=search, output_dir=tmp_path)
    assert len(more.evaluations) == len(f.asked) == 23


def test_failures_at_the_end_are_tried_again(tmp_path):
    with pytest.raises(UserError, match="all failed"):
        zoft.tune(lambda point: 1 / 0, SPACE, budget=8, output_dir=tmp_path)
    result = zoft.tune(bowl, SPACE, budget=8, output_dir=tmp_path)
    assert len(result.ranked) == 8
    assert not result.num_resumed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"space": {**SPACE, "rate": "log(1e-5,2)"}}, "its space is rate=log(1e-05,1)"),
        ({"seed": 3}, "its seed is 0, and now it is 3"),
        ({"repeats": 2}, "its repeats is 1"),
        ({"search": "random"}, "its search is zo"),
        ({"x0": {"rate": 0.1}}, "its start is None"),
    ],
)
def test_another_searchs_journal_is_refused(tmp_path, given, words):
    zoft.tune(bowl, SPACE, budget=2, output_dir=tmp_path)
    before = (tmp_path / "journal.jsonl").read_bytes()
    given = {"space": SPACE, "budget": 2, **given}
    with pytest.raises(UserError) as caught:
        zoft.tune(bowl, output_dir=tmp_path, **given)
    assert words in str(caught.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_file_that_is_no_journal_and_one_in_use(tmp_path):
    for text, words in (("hello\n", "line 1"), ('{"journal": "zoft tune 1"}\n', "older zoft")):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(UserError, match=words):
            zoft.tune(bowl, SPACE, budget=2, output_dir=tmp_path)
        assert (tmp_path / NAME).read_text() == text

    def inner(point):
        with pytest.raises(UserError, match="in use"):
            zoft.tune(bowl, SPACE, budget=2, output_dir=tmp_path / "other")
        return 0.0

    zoft.tune(inner, SPACE, budget=1, output_dir=tmp_path / "other")


# ------------------------------------------------------------------------------------------------------------ workers


def doomed(job: Job) -> JobOutcome:
    """In another process: some jobs kill it."""
    if job.number == 1:
        os.kill(os.getpid(), 9)
    return JobOutcome("done", float(job.number + os.getppid()))


def test_a_job_that_kills_its_process_fails_alone():
    jobs = [Job(number, 0, {}) for number in range(4)]
    with Workers(doomed, 2) as workers:
        outcomes = dict(workers.run(jobs))
        processes = [worker.process for worker in workers.workers]
    assert [outcomes[i].status for i in range(4)] == ["done", "failed", "done", "done"]
    assert "killed by signal 9" in outcomes[1].error
    assert [outcomes[i].value for i in (0, 2, 3)] == [os.getpid() + i for i in (0, 2, 3)]
    assert all(not process.is_alive() for process in processes)


def test_directions_follow_the_workers_and_stay_with_the_record(tmp_path: Path):
    search, known, sizes = ZOSampler({"a": "uniform(0,1)", "b": "uniform(0,1)"}, batch=4), {}, []
    for values in ([1.0, 2.0, 3.0, 4.0], [5.0] * 4, [6.0] * 4):
        points = search.points(known)
        sizes.append(len(points))
        known |= dict(zip(map(key, points), values, strict=True))
    assert sizes == [4, 4, 4]  # the first points, then both ends of two directions
    space = {"a": "uniform(0,1)", "b": "uniform(0,1)"}
    zoft.tune(Counted(lambda p: p["a"] + p["b"]), space, budget=6, output_dir=tmp_path)
    study = optuna.load_study(study_name="zoft", storage=JournalStorage(JournalFileBackend(str(tmp_path / NAME))))
    assert study.user_attrs["search"]["batch"] == 1
    assert len(study.trials) == 6


# ------------------------------------------------------------------------------------------------------------- optuna


def test_the_sampler_serves_a_study_of_optunas_own():
    def objective(trial):
        rate, width = trial.suggest_float("rate", 1e-5, 1, log=True), trial.suggest_int("width", 1, 8)
        return bowl(
            {"rate": rate, "width": width, "kind": trial.suggest_categorical("kind", ["a", "b", "c"]), "drop": 0.1}
        )

    space = {name: SPACE[name] for name in ("rate", "width", "kind")}
    study = optuna.create_study(sampler=ZOSampler(space, seed=1))
    study.optimize(objective, n_trials=60)
    result = zoft.tune(lambda point: bowl({**point, "drop": 0.1}), space, budget=60, seed=1)
    assert study.best_value == result.fun < 0.9
    several = optuna.create_study(sampler=ZOSampler(space, seed=1, batch=4))
    several.optimize(objective, n_trials=20, n_jobs=4)
    assert len(several.trials) == 20


def test_optunas_distributions_are_ranges_too():
    distributions = optuna.distributions
    space = {"rate": distributions.FloatDistribution(1e-5, 1, log=True), "width": distributions.IntDistribution(1, 8)}
    assert SearchSpace(space).texts() == {"rate": "log(1e-05,1)", "width": "int(1,8)"}
    with pytest.raises(UserError, match="a step is not served"):
        SearchSpace({"rate": distributions.FloatDistribution(0, 1, step=0.25)})


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'zoft\[tune\]'"):
        zoft.tune(bowl, SPACE, budget=4)
