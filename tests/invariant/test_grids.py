"""Processes that divide a step's points, or rows and points, take the steps of one: bit for bit where rows are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.invariant.in_grids import METHODS, STEPS
from tests.runs import REPOSITORY, environment
from zoft.errors import UserError
from zoft.estimators.central import Central
from zoft.step.shares import Shares, grid_of

Told = dict[str, list[dict[str, Any]]]  # case -> what each process has in hand
BOTH = {"parallel": "both", "parallel_directions": 2}
DIRECTIONS = {"parallel": "directions"}


def runs_of(methods: list[str], *, four: list[str], grid: list[str]) -> list[dict[str, Any]]:
    """One process, then two, then four; and runs that begin on some and go on on others."""
    begun = {"folder": "begun", "method": "n_spsa"}
    return [
        {"world": 1, "cases": {method: {"method": method} for method in methods}},
        {
            "world": 2,
            "cases": {f"{method} on 2": {"method": method, **DIRECTIONS} for method in methods}
            | {"begun": {**begun, **DIRECTIONS, "stop": 2}, "refused": "refusals"},
        },
        {
            "world": 4,
            "cases": {"resumed": {**begun, **DIRECTIONS}}
            | {f"{method} on 4": {"method": method, **DIRECTIONS} for method in four}
            | {f"{method} in a grid": {"method": method, **BOTH} for method in grid},
        },
    ]


def told_of(folder: Path, runs: list[dict[str, Any]], module: str = "tests.invariant.in_grids") -> Told:
    command = [sys.executable, "-m", module, str(folder), json.dumps(runs)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: Told = {}
    for number in range(len(runs)):
        ranks = json.loads((folder / f"{number}.json").read_text())
        results |= {case: [rank[case] for rank in ranks] for case in ranks[0]}
    return results


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return told_of(tmp_path_factory.mktemp("few"), runs_of(["mezo", "n_spsa", "zoft"], four=[], grid=["n_spsa"]))


def is_the_run_of_one(results: Told, case: str, *, bits: bool) -> None:
    """All processes hold what one process holds; without ``bits`` up to the order of sums."""
    alone, ranks = results[case.split()[0]][0], results[case]
    assert len({rank["digest"] for rank in ranks}) == 1
    for rank in ranks:
        for same in ("num_queries", "num_tokens", "steps"):
            assert rank[same] == alone[same]
        if bits:
            assert (rank["digest"], rank["losses"], rank["slopes"]) == (
                alone["digest"],
                alone["losses"],
                alone["slopes"],
            )
        else:
            assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            if alone["slopes"][0] is not None:
                assert rank["slopes"] == pytest.approx(alone["slopes"], abs=1e-3)


def grows_with_the_points_alone(results: Told, case: str, points: int) -> None:
    """float64 for each point of one's own, and one for the rows' checksum, in every step."""
    ranks = results[case]
    assert [rank["bytes_sent"] for rank in ranks] == [[8 * (points // len(ranks) + 1)] * STEPS] * len(ranks)


@pytest.mark.parametrize("case", ["mezo on 2", "n_spsa on 2", "zoft on 2"])
def test_divided_points_are_the_run_of_one_bit_for_bit(case: str, few: Told):
    is_the_run_of_one(few, case, bits=True)


@pytest.mark.parametrize("case", ["n_spsa in a grid"])
def test_a_grid_is_the_run_of_one_up_to_the_order_of_sums(case: str, few: Told):
    is_the_run_of_one(few, case, bits=False)


def test_a_run_goes_on_on_more_processes(few: Told):
    assert [rank["steps"] for rank in few["begun"]] == [2, 2]
    assert [rank["digest"] for rank in few["resumed"]] == [few["n_spsa"][0]["digest"]] * 4
    assert few["resumed"][0]["losses"] == few["n_spsa"][0]["losses"]
    assert few["resumed"][0]["num_queries"] == few["n_spsa"][0]["num_queries"]


def test_bytes_are_those_of_the_losses(few: Told):
    grows_with_the_points_alone(few, "mezo on 2", 2)
    grows_with_the_points_alone(few, "n_spsa on 2", 4)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("rows", "processes that share a step's points (trainer.parallel) were given other rows: the collator draws"),
        ("trace", "trainer.parallel=directions: MeZO's own arithmetic (estimator.noise=torch_sequential, or"),
        ("odd", "2 processes cannot divide the 3 perturbed points of a step evenly (trainer.parallel): choose"),
        ("stream", "trainer.parallel gives several processes the same rows, and a stream (IterableDataset) may"),
        ("grid", "trainer.parallel_directions=3 does not divide the 2 processes that were started: start a multiple"),
        ("backward", "estimator=backprop has a backward pass, which is no point that another process could ask: use"),
    ],
)
def test_what_cannot_be_divided_is_refused(what: str, sentence: str, few: Told):
    assert [rank[what][: len(sentence)] for rank in few["refused"]] == [sentence, sentence]


def test_a_grid_has_two_sides():
    assert grid_of("data", 0, 4, Central()) == (4, 1)
    assert grid_of("directions", 0, 4, Central(num_directions=2)) == (1, 4)
    assert grid_of("both", 2, 6, Central()) == (3, 2)
    assert grid_of("pipeline", 0, 4, Central(num_directions=3)) == (1, 4)
    with pytest.raises(UserError, match="must be one of data, directions, both, pipeline, got 'rows'"):
        grid_of("rows", 0, 2, Central())
    with pytest.raises(UserError, match="parallel=data has none: leave it out"):
        grid_of("data", 2, 2, Central())
    with pytest.raises(UserError, match=r"give trainer\.parallel_directions"):
        grid_of("both", 0, 2, Central())


@pytest.mark.parametrize(("count", "number"), [(1, 3), (2, 5), (4, 9), (4, 2)])
def test_every_question_is_asked_once(count: int, number: int):
    asked = [list(Shares(count, rank).questions(number)) for rank in range(count)]
    assert [question for some in asked for question in some] == list(range(number))
    assert max(map(len, asked)) == -(-number // count)


@pytest.fixture(scope="module")
def all_methods(tmp_path_factory: pytest.TempPathFactory) -> Told:
    # accelerate repeats rows where a pass does not fill the last step of all processes: mezo's does not
    grid = [method for method in METHODS if method != "mezo"]
    four = ["n_spsa", "fzoo", "es", "grzo", "per_prompt", "svrg", "trials", "zoft", "zoft_loss"]
    return told_of(tmp_path_factory.mktemp("all"), runs_of(list(METHODS), four=four, grid=grid))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_divides_its_points(method: str, all_methods: Told):
    is_the_run_of_one(all_methods, f"{method} on 2", bits=True)
    if f"{method} in a grid" in all_methods:
        is_the_run_of_one(all_methods, f"{method} in a grid", bits=False)
    if f"{method} on 4" in all_methods:
        is_the_run_of_one(all_methods, f"{method} on 4", bits=True)
