"""Judges in processes of their own: what hangs, dies or raises costs its own text and a bounded time."""

from __future__ import annotations

import time

import pytest

from tests import runs
from tests.contract.discovered import coordinates_of
from tests.models import tiny_llama
from tests.unit.lm.objectives.test_objectives_more import generated
from zoft.component import create
from zoft.config import compose
from zoft.errors import UserError
from zoft.estimators.base import Point
from zoft.lm.objectives import _grading
from zoft.lm.objectives.reward import Reward
from zoft.noise.direction import Direction
from zoft.report import ungraded
from zoft.run.train import run
from zoft.weights.tensors import Weights

JUDGE = """import os, time
def score(prompts, generations, answers):
    (text,), (answer,) = generations, answers
    print("this is no reply")
    if text == "hangs":
        time.sleep(600)
    if text == "leaves":
        os._exit(3)
    if text == "dies":
        os.kill(os.getpid(), 9)
    if text == "raises":
        return [1 / 0]
    if text == "nothing":
        return []
    return [len(text) + answer]
def picky(prompts, generations):
    if "free" in prompts[0]:
        raise ValueError("no taste")
    return [generations[0].count("i")]
def slow(prompts, generations):
    began = time.time()
    time.sleep(0.4)
    with open("judged.txt", "a") as file:
        file.write(f"{began} {time.time()}\\n")
    return [len(prompts[0]) / 10 + sum(map(ord, generations[0])) / 100]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    _grading.take_ungraded()
    yield
    for judges in list(_MADE):
        judges.close()
    _grading.judges.cache_clear()


_MADE: list[_grading.Judges] = []


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    make = _grading.Judges.__init__
    monkeypatch.setattr(_grading.Judges, "__init__", lambda self, *given: _MADE.append(self) or make(self, *given))


def graded(texts, function="./judge.py:score", **settings):
    reward = Reward(function=function, workers=2, **{"timeout": 0.5, **settings})
    return reward.rewards(["prompt"] * len(texts), texts, [0.5] * len(texts))


def test_every_failure_costs_its_own_text_and_is_counted_with_its_row(caplog):
    texts = ["a", "hangs", "leaves", "dies", "raises", "nothing", "abc", "hangs", "abcd"]
    began = time.monotonic()
    assert graded(texts, failed=-9) == [1.5, -9, -9, -9, -9, -9, 3.5, -9, 4.5]
    assert time.monotonic() - began < 60
    lost = {one.text: one.why for one in _grading.take_ungraded()}
    assert lost == {
        "hangs": "no number within 0.5 s",
        "leaves": "its process exited with 3",
        "dies": "its process died of SIGKILL",
        "raises": "it raised ZeroDivisionError: division by zero (judge.py, line 12)",
        "nothing": "it returned [] instead of a list of one finite number",
    }
    assert len(caplog.messages) == 3  # and no line for each of a thousand
    assert "it counts as -9; others are counted, and not said one by one" in caplog.messages[-1]
    assert not _grading.take_ungraded()


def test_samples_are_those_of_one_process_in_their_order():
    apart = Reward(function="./judge.py:score", workers=2).rewards_of_samples(
        ["p"] * 2, [["a", "bb"], ["c", ""]], [1, 2]
    )
    assert apart == [[2.0, 4.0], [2.0, 2.0]]
    assert Reward(function="zoft.lm.rewards:countdown", workers=1).rewards(["1 2"], ["1+2"], [3]) == [1.0]


def test_without_a_number_for_them_the_first_one_ends_the_run():
    with pytest.raises(UserError, match=r"no number within 0.5 s, for the text 'hangs' of 'prompt': raise objective"):
        graded(["hangs"] * 50)
    with pytest.raises(UserError, match=r"judge.py:score raised ValueError: .*judge.py.*objective.workers=1 objective"):
        Reward(function="./judge.py:score").rewards(["p"] * 2, ["a"] * 2, [0, 0])


def test_a_function_that_fails_always_ends_the_run_in_a_bounded_time(monkeypatch):
    monkeypatch.setattr(_grading, "MOST_IN_A_ROW", 3)
    with pytest.raises(UserError, match="so it was with 3 texts in a row"):
        graded(["raises"] * 5, failed=0.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"timeout": 3.0}, "workers must be at least 1 with timeout or failed"),
        ({"failed": 0.0}, "workers must be at least 1 with timeout or failed"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"workers": 1, "timeout": 0.0}, "timeout must be > 0 and finite"),
        ({"workers": 1, "failed": float("nan")}, "failed must be null or finite"),
        ({"workers": 1, "function": lambda prompts, generations: []}, "put it into a module or a file"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        Reward(**{"function": "./judge.py:score", **given}).prepare()


def most_at_once(path):
    """How many texts were judged at the same time, at most; the file is begun anew."""
    spans = [tuple(map(float, line.split())) for line in path.read_text().splitlines()]
    path.unlink()
    return max(sum(begin <= at < end for begin, end in spans) for at, _ in spans)


def test_texts_of_all_points_are_judged_at_once(tmp_path):
    """Two batches a query, a text each: four points' texts go to the judges together, and losses are those alone."""
    model = tiny_llama(vocab_size=4 + len(runs.WORDS))
    before = Weights(model).digest()
    rows, collate, _ = generated()
    batches = [collate(rows[:1]), collate(rows[1:2])]
    points = [Point(Direction(3, 1, index), sign * 0.3) for index in range(2) for sign in (1, -1)]

    def losses(**settings):
        reward = Reward(function="./judge.py:slow", **settings)
        session = create("engine", "in_place", "in_place").bind(
            model,
            coordinates_of("full", model, "gaussian"),
            lambda several: sum(reward.loss(model, b) for b in several),
        )
        for _ in range(2):  # what waits for judges shows in the first queries
            (tmp_path / "judged.txt").unlink(missing_ok=True)
            values = session.losses(batches, points)
        return values.tolist(), most_at_once(tmp_path / "judged.txt")

    alone, one = losses()
    assert len(set(alone)) > 2
    assert one == 1
    together, most = losses(workers=4)
    assert together == alone
    assert most == 4
    assert Weights(model).digest() == before


def test_a_judge_that_ends_the_run_leaves_the_weights_as_they_were():
    model = tiny_llama(vocab_size=4 + len(runs.WORDS))
    before = Weights(model).digest()
    rows, collate, _ = generated()
    batch, reward = collate(rows), Reward(function="./judge.py:picky", workers=2)
    session = create("engine", "in_place", "in_place").bind(
        model, coordinates_of("full", model, "gaussian"), lambda batch: reward.loss(model, batch)
    )
    points = [Point(Direction(3, 1), 0.3), Point(Direction(3, 1), -0.3)]
    session.losses(batch, points)
    batch["prompts"][-1] = "it is free"
    with pytest.raises(UserError, match="no taste"):
        session.losses(batch, points)
    assert Weights(model).digest() == before
    batch["prompts"][-1] = "it is"
    assert len(session.losses(batch, points)) == 2


def test_a_row_that_is_no_json_is_one_sentence():
    with pytest.raises(UserError, match=r"as JSON, and .* is none"):
        Reward(function="./judge.py:score", workers=1).rewards(["p"], ["a"], [object()])


def test_a_run_counts_them_and_one_that_was_stopped_goes_on_with_a_number_for_them(tmp_path, capsys):
    words = runs.arguments(tmp_path, tmp_path / "out", "objective=reward", "objective.function=./judge.py:picky")
    words = [w for w in words if not w.startswith(("task.template", "task.words"))]
    words += ["task.columns={prompt: text, reward: label}", "task.format=reward", "objective.max_new_tokens=2"]
    words += ["objective.workers=2", "weighting=ranks", "estimator.num_directions=2"]
    with pytest.raises(UserError, match=r"it raised ValueError: no taste \(judge.py, line 18\), for the text"):
        run(compose(words))
    _grading._ungraded.append(_grading.Ungraded("p", "of another run", "it hung"))  # one that broke off in this process
    facts = run(compose([*words, "objective.failed=-1"]))
    rows = (tmp_path / "out" / ungraded.NAME).read_text().splitlines()
    assert facts["num_ungraded"] == len(rows) > 0
    assert not [row for row in rows if "of another run" in row]
    assert f"texts ungraded | {len(rows):,}: `ungraded.jsonl` says why" in (tmp_path / "out" / "report.md").read_text()
