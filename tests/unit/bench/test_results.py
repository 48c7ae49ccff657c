"""What the rows of a bench say, from rows made up by hand: targets, gaps, ranks, what is to come, what diverged."""

import math

import pytest

from zoft.bench.choosing import rate_searches
from zoft.bench.plan import Cell, Entry, Plan
from zoft.bench.results import Results
from zoft.bench.table import at_budgets, markdown


def row(losses, *, test=0.5, metric="accuracy", factor=1.0, seed=0, failed=""):
    """A run whose dev loss was this at 0, 10, 20, ... queries."""
    curve = [
        {"queries": 10 * i, "loss": loss, metric: loss if metric == "loss" else 1 - loss}
        for i, loss in enumerate(losses)
    ]
    return {
        **{"metric": metric, "curve": curve, "factor": factor, "seed": seed, "failed": failed, "learning_rate": factor},
        **{"test": None if failed else {metric: test, "loss": test}, "queries_a_step": 2, "num_test": 100},
        **{"seconds": 10.0 + seed, "peak_memory_mb": 150.0 + seed, "memory_before_mb": 100.0},
    }


def plan(methods, **more):
    return Plan(
        tasks={task: [] for task in more.pop("tasks", ["t"])},
        methods={name: Entry(1.0) for name in methods},
        **{
            "references": [],
            "prompts": ["none"],
            "seeds": [0, 1],
            "rates": [1.0],
            "queries": 20,
            "baseline": "mezo",
            "grow": 0,
        }
        | more,
    )


def bench(methods, rows, **more):
    """Results of {(method, seed): row}, or {(task, method, seed): row}."""
    bench_plan = plan(methods, **more)
    cells = {}
    for (*task, method, seed), one in rows.items():
        cells[Cell(task[0] if task else "t", "none", method, one["factor"], seed)] = one | {"seed": seed}
    return Results(bench_plan, cells)


GROUP = ("t", "none")


def test_the_baseline_reaches_its_own_target():
    results = bench(["mezo"], {("mezo", 0): row([1.0, 0.5, 0.9]), ("mezo", 1): row([1.0, 0.9, 0.5])})
    assert results.target(GROUP) == pytest.approx(0.7)  # the mean curve is 1, 0.7, 0.7
    reached = results.results[GROUP, "mezo"].queries_to(0.7)
    assert reached == [pytest.approx(6.0), pytest.approx(15.0)]
    assert results.results[GROUP, "mezo"].queries_to(1.0) == [0, 0]  # the untrained model is there already
    assert results.results[GROUP, "mezo"].queries_to(0.1) == [math.inf, math.inf]


def test_gaps_are_taken_seed_by_seed():
    rows = {
        ("mezo", 0): row([1, 0.5]),
        ("mezo", 1): row([1, 0.7]),
        ("adamw", 0): row([1, 0.1]),
        ("adamw", 1): row([1, 0.2]),
    }
    assert bench(["mezo", "adamw"], rows).gap(GROUP, "mezo", "adamw") == [pytest.approx(0.4), pytest.approx(0.5)]
    del rows["adamw", 1]
    assert bench(["mezo", "adamw"], rows).gap(GROUP, "mezo", "adamw") == [pytest.approx(0.4)]


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "high"), ("loss", "low")])
def test_ranks_know_which_way_a_metric_is_better(metric, best):
    rows = {(m, s): row([1, 0.5], test=t, metric=metric) for m, t in (("low", 0.2), ("high", 0.8)) for s in (0, 1)}
    results = bench(["low", "high"], rows)
    assert min(results.ranks("none"), key=results.ranks("none").get) == best
    assert results.of(GROUP)[0].method == best


def test_who_diverges_ranks_last_and_who_is_not_done_does_not_rank():
    fine = {
        (t, m, s): row([1, 0.5], test=v) for t in ("t", "u") for m, v in (("mezo", 0.6), ("x", 0.9)) for s in (0, 1)
    }
    assert bench(["mezo", "x"], fine, tasks=["t", "u"]).ranks("none") == {"mezo": 2.0, "x": 1.0}
    broke = {key: one for key, one in fine.items() if key != ("u", "x", 1)} | {("u", "x", 0): row([1, 9], failed="nan")}
    assert bench(["mezo", "x"], broke, tasks=["t", "u"]).ranks("none") == {"mezo": 1.5, "x": 1.5}
    half = fine | {("u", "x", 1): row([1, 9], failed="nan")}
    assert bench(["mezo", "x"], half, tasks=["t", "u"]).ranks("none") == {"mezo": 1.5, "x": 1.5}
    missing = {key: one for key, one in fine.items() if key != ("u", "x", 1)}
    assert bench(["mezo", "x"], missing, tasks=["t", "u"]).ranks("none") == {"mezo": 1.0}


def test_the_table_says_what_is_to_come_and_what_diverges():
    rates = {"rates": [0.5, 1.0]}
    begun = bench(["mezo"], {("mezo", 0): row([1, 0.5], factor=0.5)}, **rates)
    text = markdown(begun.plan, begun)
    assert "(2 to come)" in text
    assert "diverges" not in text
    bench_plan = plan(["mezo"], **rates)
    cells = {Cell("t", "none", "mezo", f, 0): row([1, 9], factor=f, failed="nan") for f in (0.5, 1.0)}
    text = markdown(bench_plan, Results(bench_plan, cells))
    assert "| mezo | diverges |" in text
    assert "diverges at every rate" in text
    assert "to come" not in text


@pytest.mark.parametrize(
    ("losses", "factors", "chosen"),
    [
        ({1.0: 0.5, 2.0: 0.6}, (0.5, 1.0, 2.0), None),  # the smallest is best: a smaller one is asked for
        ({0.5: 0.7, 1.0: 0.5, 2.0: 0.6}, (0.5, 1.0, 2.0), 1.0),
        ({0.5: 0.4, 1.0: 0.5, 2.0: 0.6}, (0.25, 0.5, 1.0, 2.0), None),
        ({0.25: 0.3, 0.5: 0.4, 1.0: 0.5, 2.0: 0.6}, (0.25, 0.5, 1.0, 2.0), 0.25),  # twice and no more
        ({1.0: 0.6, 2.0: 0.5}, (1.0, 2.0, 4.0), None),
        ({1.0: math.inf, 2.0: math.inf}, (0.5, 1.0, 2.0), None),
        ({0.25: math.inf, 0.5: math.inf, 1.0: math.inf, 2.0: math.inf}, (0.25, 0.5, 1.0, 2.0), None),
        ({1.0: 0.5}, (1.0, 2.0), None),  # the other one is to come
    ],
)
def test_the_search_for_a_learning_rate_goes_beyond_an_edge(losses, factors, chosen):
    bench_plan = plan(["mezo"], rates=[1.0, 2.0], grow=2)
    rows = {
        Cell("t", "none", "mezo", f, 0): row([1, min(v, 9)], factor=f, failed="nan" * math.isinf(v))
        for f, v in losses.items()
    }
    search = rate_searches(bench_plan, rows)["t", "none", "mezo"]
    assert (search.factors, search.chosen) == (factors, {20: chosen} if chosen else {})
    asked = [cell.factor for cell in bench_plan.cells({("t", "none", "mezo"): search}) if cell.seed == 0]
    assert asked == list(factors)
    assert [cell.factor for cell in bench_plan.cells({("t", "none", "mezo"): search}) if cell.seed == 1] == [
        chosen
    ] * bool(chosen)


def budgeted(early, late, *, factor=1.0, failed="", broken_early=False):
    """A run of 20 queries that is judged after 10, too: (dev loss, test accuracy) at both."""
    result = row([1.0, early[0], late[0]], test=late[1], factor=factor, failed=failed)
    at = {"failed": "nan" * broken_early, "test": None if broken_early else {"accuracy": early[1], "loss": early[0]}}
    return result | {"at_budgets": {"10": at}}


def test_each_budget_has_a_rate_and_a_best_point_of_its_own():
    """The large rate is better early and worse late; the other seeds are run with both."""
    bench_plan = plan(["mezo"], rates=[1.0, 4.0], budgets=[10])
    rows = {
        Cell("t", "none", "mezo", 1.0, 0): budgeted((0.8, 0.6), (0.3, 0.9)),
        Cell("t", "none", "mezo", 4.0, 0): budgeted((0.5, 0.8), (0.7, 0.7), factor=4.0),
    }
    search = rate_searches(bench_plan, rows)["t", "none", "mezo"]
    assert search.chosen == {10: 4.0, 20: 1.0}
    others = [cell for cell in bench_plan.cells({("t", "none", "mezo"): search}) if cell.seed == 1]
    assert [cell.factor for cell in others] == [1.0, 4.0]
    early, late = (Results(bench_plan, rows, budget).results[GROUP, "mezo"] for budget in (10, None))
    assert (early.factor, early.test(), [point["loss"] for point in early.dev()]) == (4.0, [0.8], [0.5])
    assert (late.factor, late.test(), [point["loss"] for point in late.dev()]) == (1.0, [0.9], [0.3])
    assert early.curve("loss") == [(0, 1.0), (10, 0.5)]
    rows |= {Cell("t", "none", "mezo", cell.factor, 1): budgeted((0.6, 0.7), (0.4, 0.8), factor=4.0) for cell in others}
    (table, _) = at_budgets(bench_plan, rows)
    assert "| mezo | 75.0 (70.0), 0.550 * | 85.0 (80.0), 0.350 * |" in table


def test_what_diverges_late_has_not_done_so_early():
    bench_plan = plan(["mezo"], budgets=[10], seeds=[0])
    rows = {Cell("t", "none", "mezo", 1.0, 0): budgeted((0.5, 0.8), (9, 0.1), failed="nan")}
    assert rate_searches(bench_plan, rows)["t", "none", "mezo"].chosen == {10: 1.0}
    assert Results(bench_plan, rows, 10).results[GROUP, "mezo"].test() == [0.8]
    assert Results(bench_plan, rows).results[GROUP, "mezo"].diverges
    assert "| mezo | 80.0 (80.0), 0.500 * | diverges |" in at_budgets(bench_plan, rows)[0]


def test_each_end_is_searched_for_the_budget_that_wants_it():
    bench_plan = plan(["mezo"], rates=[1.0, 4.0], grow=1, budgets=[10])
    rows = {
        Cell("t", "none", "mezo", 1.0, 0): budgeted((0.8, 0.6), (0.3, 0.9)),
        Cell("t", "none", "mezo", 4.0, 0): budgeted((0.5, 0.8), (0.7, 0.7), factor=4.0),
        Cell("t", "none", "mezo", 0.25, 0): budgeted((0.9, 0.5), (0.5, 0.8), factor=0.25),
    }
    assert rate_searches(bench_plan, rows)["t", "none", "mezo"].factors == (0.25, 1.0, 4.0, 16.0)
    rows[Cell("t", "none", "mezo", 16.0, 0)] = budgeted((0.4, 0.8), (0.9, 0.5), factor=16.0)
    search = rate_searches(bench_plan, rows)["t", "none", "mezo"]
    assert (search.factors, search.chosen) == ((0.25, 1.0, 4.0, 16.0), {10: 16.0, 20: 1.0})


def test_memory_is_the_median_and_seconds_are_the_fastest():
    rows = {("mezo", seed): row([1, 0.5], seed=seed) for seed in (0, 1, 2)}
    result = bench(["mezo"], rows, seeds=[0, 1, 2]).results[GROUP, "mezo"]
    assert (result.memory_mb(), result.seconds()) == (51.0, 10.0)
