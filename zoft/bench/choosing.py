"""What is chosen by the dev rows: the best point of a run, and a method's learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    points = [point for point in row["curve"] if point["queries"] > 0]
    if row["failed"] or not points:
        return None
    best: Point = min(points, key=lambda point: dev_score(point, row["metric"], select))
    return best


def rate_searches(plan: Plan, rows: Mapping[Cell, Row]) -> dict[tuple[str, str, str], RateSearch]:
    """(task, prompt, method) -> its search.

    First the plan's rates are tried; while the best is the smallest or the largest, one more is tried beyond it,
    ``plan.grow`` times at most. Where all break, smaller ones are tried. Of equals the factor nearest to 1 is taken.
    """
    keys = [(task, prompt, method) for task in plan.tasks for prompt in plan.prompts for method in plan.runs]
    return {key: _search(plan, rows, key) for key in keys}


def _search(plan: Plan, rows: Mapping[Cell, Row], key: tuple[str, str, str]) -> RateSearch:
    factors = sorted(plan.rates)
    while True:
        cells = [Cell(*key, factor, plan.seeds[0]) for factor in factors]
        if any(cell not in rows for cell in cells):
            return RateSearch(tuple(factors), None)
        best = min(cells, key=lambda cell: (score(rows[cell], plan), abs(math.log(cell.factor or 1.0))))
        broke = math.isinf(score(rows[best], plan))
        more = len(factors) - len(plan.rates) < plan.grow and len(factors) > 1
        if more and (broke or best is cells[0]):
            factors.insert(0, factors[0] ** 2 / factors[1])
        elif more and best is cells[-1]:
            factors.append(factors[-1] ** 2 / factors[-2])
        else:
            return RateSearch(tuple(factors), None if broke else best.factor)


def score(row: Row, plan: Plan) -> float:
    """How bad a run's best point is; infinite for one that broke."""
    best = best_point(row, plan.select)
    return math.inf if best is None else dev_score(best, row["metric"], plan.select)
