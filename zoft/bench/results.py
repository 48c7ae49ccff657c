"""What the rows of a bench say: a method's scores over its seeds, queries to a target, gaps, ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

from zoft.bench.choosing import Point, best_point, chosen_factors, score
from zoft.bench.ledger import Row
from zoft.bench.plan import Cell, Plan
from zoft.evaluation.intervals import mean_of_seeds

Group = tuple[str, str]
"""(task, prompt)."""


@dataclass
class Result:
    """A method on one task with one prompt, at the learning rate that the dev rows chose.

    Args:
        method: its name.
        rows: one a seed.
        rates: factor of the learning rate -> the first seed's row.
        select: what points are chosen by.
    """

    method: str
    rows: list[Row]
    rates: dict[float, Row]
    select: str

    @property
    def metric(self) -> str:
        """Name of what is reported."""
        return str(next(iter(self.rates.values()))["metric"])

    @property
    def finished(self) -> list[Row]:
        """Rows of the seeds that did not diverge."""
        return [row for row in self.rows if row["test"] is not None]

    @property
    def broken(self) -> int:
        """Seeds that diverged."""
        return len(self.rows) - len(self.finished)

    @property
    def factor(self) -> float | None:
        """Of the learning rate; None where every one diverged."""
        return self.rows[0]["factor"] if self.rows else None

    @property
    def at_edge(self) -> bool:
        """Whether the learning rate is the largest or smallest that was tried, so that a better one may lie beyond."""
        return len(self.rates) > 1 and self.factor in (min(self.rates), max(self.rates))

    def test(self) -> list[float]:
        """The test metric of each finished seed."""
        return [row["test"][self.metric] for row in self.finished]

    def dev(self) -> list[Point]:
        """Each finished seed's best point on the dev rows."""
        points = (best_point(row, self.select) for row in self.finished)
        return [point for point in points if point is not None]

    def cost(self, name: str) -> float:
        """The mean of what a row says of costs: seconds, peak_memory_mb."""
        return mean(row[name] for row in self.finished) if self.finished else math.nan

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(queries, mean over the finished seeds) of ``loss`` or of the metric on the dev rows."""
        seeds = [{point["queries"]: point[name] for point in row["curve"]} for row in self.finished]
        common = sorted(set.intersection(*map(set, seeds))) if seeds else []
        return [(queries, mean(points[queries] for points in seeds)) for queries in common]

    def queries_to(self, loss: float) -> float:
        """Queries until the mean dev loss is this low, along a line between evaluations; infinite if it never is."""
        for (q0, l0), (q1, l1) in pairwise(self.curve("loss")):
            if l1 <= loss < l0:
                return q0 + (q1 - q0) * (l0 - loss) / (l0 - l1)
        return math.inf


class Results:
    """All that a bench has found.

    Args:
        plan: the bench.
        rows: of the cells that are there.
    """

    def __init__(self, plan: Plan, rows: Mapping[Cell, Row]) -> None:
        self.plan = plan
        chosen = chosen_factors(plan, rows)
        self.groups: list[Group] = [(task, prompt) for task in plan.tasks for prompt in plan.prompts]
        self.untrained = {
            (group, mode): row
            for group in self.groups
            for mode in plan.modes
            if (row := rows.get(Cell(*group, mode))) is not None
        }
        self.results: dict[tuple[Group, str], Result] = {}
        for group in self.groups:
            for method in plan.runs:
                cells = {factor: Cell(*group, method, factor, plan.seeds[0]) for factor in plan.rates}
                rates = {factor: rows[cell] for factor, cell in cells.items() if cell in rows}
                factor = chosen.get((*group, method))
                seeds = [] if factor is None else [Cell(*group, method, factor, seed) for seed in plan.seeds]
                if rates:
                    there = [rows[cell] for cell in seeds if cell in rows]
                    self.results[group, method] = Result(method, there, rates, plan.select)

    def of(self, group: Group) -> list[Result]:
        """The methods of a task and prompt, the best test metric first."""
        there = [self.results[group, method] for method in self.plan.runs if (group, method) in self.results]
        return sorted(there, key=lambda result: -mean(result.test()) if result.test() else math.inf)

    def target(self, group: Group) -> float:
        """The dev loss that queries are counted to: the plan's, or the baseline's at its end."""
        if self.plan.target is not None:
            return self.plan.target
        baseline = self.results.get((group, self.plan.baseline))
        return mean(point["loss"] for point in baseline.dev()) if baseline and baseline.dev() else math.nan

    def gap(self, group: Group, method: str, reference: str) -> float:
        """How far a method's mean dev loss is above a reference's, nats; NaN where one of them is not there."""
        losses = []
        for name in (method, reference):
            result = self.results.get((group, name))
            losses.append(mean(point["loss"] for point in result.dev()) if result and result.dev() else math.nan)
        return losses[0] - losses[1]

    def ranks(self, prompt: str) -> dict[str, float]:
        """Mean rank over the tasks by the mean test metric, 1 the best; equals share. References are not ranked."""
        ranks: dict[str, list[float]] = {}
        for group in self.groups:
            if group[1] == prompt:
                scores = {result.method: mean(result.test()) for result in self.of(group) if result.test()}
                scores = {method: own for method, own in scores.items() if method not in self.plan.references}
                for method, own in scores.items():
                    better = sum(other > own for other in scores.values())
                    equal = sum(other == own for other in scores.values())
                    ranks.setdefault(method, []).append(better + (equal + 1) / 2)
        return {method: mean(values) for method, values in ranks.items()}

    def robustness(self, method: str) -> dict[float, float]:
        """Factor of the learning rate -> mean over tasks and prompts of what it loses on the best one, dev loss, nats.

        Infinite where it diverges anywhere.
        """
        lost: dict[float, list[float]] = {}
        for group in self.groups:
            result = self.results.get((group, method))
            if result is None or set(result.rates) != set(self.plan.rates):
                continue
            losses = {factor: _dev_loss(row, self.plan) for factor, row in result.rates.items()}
            best = min(losses.values())
            for factor, loss in losses.items():
                lost.setdefault(factor, []).append(loss - best if math.isfinite(best) else math.inf)
        return {factor: mean(values) for factor, values in sorted(lost.items())}


def _dev_loss(row: Row, plan: Plan) -> float:
    point = best_point(row, plan.select)
    return math.inf if point is None or not math.isfinite(score(row, plan)) else point["loss"]


def interval(numbers: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) over seeds.

    Example:
        >>> interval([0.5])
        (0.5, -inf, inf)
    """
    return (mean(numbers), *mean_of_seeds(numbers))


def agreement(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Kendall's tau-b of two rankings: 1 the same order, -1 the reverse, NaN of fewer than two methods.

    Args:
        first: method -> rank.
        second: the same.

    Example:
        >>> agreement({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "c": 2}) > 0.3
        True

    References: Kendall 1945, The treatment of ties in ranking problems, Biometrika 33.
    """
    names = sorted(first.keys() & second.keys())
    agree = ties_first = ties_second = pairs = 0
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            x, y = first[a] - first[b], second[a] - second[b]
            pairs += 1
            ties_first += x == 0
            ties_second += y == 0
            agree += (x * y > 0) - (x * y < 0)
    scale = math.sqrt((pairs - ties_first) * (pairs - ties_second))
    return agree / scale if scale else math.nan
