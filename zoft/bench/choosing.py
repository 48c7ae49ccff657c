"""What is chosen by the dev rows: the best point of a run, and a method's learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

from zoft.bench.ledger import Row
from zoft.bench.plan import Cell, Plan

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


def chosen_factors(plan: Plan, rows: Mapping[Cell, Row]) -> dict[tuple[str, str, str], float]:
    """(task, prompt, method) -> the factor of its learning rate with the best dev score under the first seed.

    Those whose cells are not all there yet are left out, and those that broke at every learning rate. Of equals the
    factor nearest to 1 is taken.
    """
    chosen = {}
    for task in plan.tasks:
        for prompt in plan.prompts:
            for method in plan.runs:
                cells = [Cell(task, prompt, method, factor, plan.seeds[0]) for factor in plan.rates]
                if all(cell in rows for cell in cells):
                    best = min(cells, key=lambda cell: (score(rows[cell], plan), abs(math.log(cell.factor or 1.0))))
                    if math.isfinite(score(rows[best], plan)):
                        chosen[task, prompt, method] = best.factor or 1.0
    return chosen


def score(row: Row, plan: Plan) -> float:
    """How bad a run's best point is; infinite for one that broke."""
    best = best_point(row, plan.select)
    return math.inf if best is None else dev_score(best, row["metric"], plan.select)
