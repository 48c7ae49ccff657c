"""Choices made on the dev rows: the best point of a run, and a method's learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from zoft.bench.ledger import Row
from zoft.bench.plan import Cell, Plan, RateSearch

Point = dict[str, float]


def badness(value: float, metric: str) -> float:
    """A metric's value with a sign such that less is better; infinite where it is not a number.

    Example:
        >>> badness(0.8, "accuracy"), badness(0.8, "loss")
        (-0.8, 0.8)
    """
    return math.inf if not math.isfinite(value) else value if metric == "loss" else -value


def dev_score(point: Mapping[str, float], metric: str, select: str) -> float:
    """How bad a point is on the dev rows, by what the bench selects by; infinite where it is not a number.

    Example:
        >>> dev_score({"loss": 0.5, "accuracy": 0.8}, "accuracy", "metric")
        -0.8
    """
    return badness(point["loss"], "loss") if select == "loss" else badness(point[metric], metric)


def best_point(row: Row, select: str) -> Point | None:
    """The point of a run that its test scores are of; None where it broke. The untrained model is not one."""
    return None if row["failed"] else best_of(row["curve"], row["metric"], select)


def best_of(curve: Iterable[Point], metric: str, select: str) -> Point | None:
    """The point of a curve with the best dev score, the first of equals; the untrained model is none.

    Example:
        >>> best_of([{"queries": 0, "loss": 0.1}, {"queries": 2, "loss": 0.7}], "f1", "loss")
        {'queries': 2, 'loss': 0.7}
    """
    points = [point for point in curve if point["queries"] > 0]
    return min(points, key=lambda point: dev_score(point, metric, select), default=None)


def within(row: Row, queries: int) -> Row:
    """A run's row cut at a smaller budget of the bench; unchanged where the budget is the run's own.

    One that diverged later had not done so yet.
    """
    at = row.get("at_budgets", {}).get(str(queries))
    if at is None:
        return row
    curve = [point for point in row["curve"] if point["queries"] <= queries]
    return row | at | {"curve": curve}


def rate_searches(plan: Plan, rows: Mapping[Cell, Row]) -> dict[tuple[str, str, str], RateSearch]:
    """(task, prompt, method) -> its search.

    First the plan's rates are tried; while the best at one of the budgets is the smallest or the largest, one more is
    tried beyond it, ``plan.grow`` times at most at each end, or in all where there is one budget. Where all break,
    smaller ones are tried. Of equals the factor nearest to 1 is taken.
    """
    keys = [(task, prompt, method) for task in plan.tasks for prompt in plan.prompts for method in plan.runs]
    return {key: _search(plan, rows, key) for key in keys}


def _search(plan: Plan, rows: Mapping[Cell, Row], key: tuple[str, str, str]) -> RateSearch:
    factors = sorted(plan.rates)
    below = above = 0
    while True:
        cells = [Cell(*key, factor, plan.seeds[0]) for factor in factors]
        if any(cell not in rows for cell in cells):
            return RateSearch(tuple(factors), {})
        chosen = {budget: _best(plan, cells, rows, budget) for budget in plan.all_budgets}
        spent = 0 if plan.budgets else below + above
        wanted = [math.nan if cell is None else cell.factor for cell in chosen.values()]
        more = len(factors) > 1
        smaller = None in chosen.values() or factors[0] in wanted
        if more and max(below, spent) < plan.grow and smaller:
            factors.insert(0, factors[0] ** 2 / factors[1])
            below += 1
        elif more and max(above, spent) < plan.grow and factors[-1] in wanted:
            factors.append(factors[-1] ** 2 / factors[-2])
            above += 1
        else:
            factor_at = {budget: cell.factor for budget, cell in chosen.items() if cell is not None and cell.factor}
            return RateSearch(tuple(factors), factor_at)


def _best(plan: Plan, cells: list[Cell], rows: Mapping[Cell, Row], budget: int) -> Cell | None:
    """The cell with the best dev score within a budget; None where all have broken by then."""

    def badness_of(cell: Cell) -> float:
        return score(within(rows[cell], budget), plan)

    best = min(cells, key=lambda cell: (badness_of(cell), abs(math.log(cell.factor or 1.0))))
    return None if math.isinf(badness_of(best)) else best


def score(row: Row, plan: Plan) -> float:
    """How bad a run's best point is; infinite for one that broke."""
    best = best_point(row, plan.select)
    return math.inf if best is None else dev_score(best, row["metric"], plan.select)
