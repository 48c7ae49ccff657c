"""Results of a bench, computed from its rows: scores over a method's seeds, queries to a target, gaps, ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

from zoft.bench.choosing import Point, badness, best_point, rate_searches, score, within
from zoft.bench.ledger import Row
from zoft.bench.plan import Cell, Plan, RateSearch
from zoft.lm.metrics.intervals import mean_of_seeds

Group = tuple[str, str]
"""(task, prompt)."""


@dataclass
class MethodResult:
    """A method on one task with one prompt, at the learning rate that the dev rows chose.

    Args:
        method: its name.
        rows: one a seed.
        rates: factor of the learning rate -> the first seed's row.
        search: for its learning rate.
        plan: the bench.
        budget: queries of a run.
    """

    method: str
    rows: list[Row]
    rates: dict[float, Row]
    search: RateSearch
    plan: Plan
    budget: int

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
    def diverges(self) -> bool:
        """Whether the method diverges at every learning rate, so that the other seeds need not run."""
        return len(self.rates) == len(self.search.factors) and not self.rows

    @property
    def pending(self) -> int:
        """Cells that are still to come."""
        if self.diverges:
            return 0
        return len(self.search.factors) - len(self.rates) + len(self.plan.seeds) - max(1, len(self.rows))

    @property
    def factor(self) -> float | None:
        """The factor of the learning rate; None where every factor diverged."""
        return self.rows[0]["factor"] if self.rows else None

    @property
    def at_edge(self) -> bool:
        """Whether the learning rate is the largest or smallest that was tried, so that a better one may lie beyond."""
        return self.factor in (min(self.rates), max(self.rates))

    def test(self) -> list[float]:
        """The test metric of each finished seed."""
        return [row["test"][self.metric] for row in self.finished]

    def dev(self) -> list[Point]:
        """Each finished seed's best point on the dev rows."""
        points = (best_point(row, self.plan.select) for row in self.finished)
        return [point for point in points if point is not None]

    def badness(self) -> float:
        """The mean test metric, less is better; infinite where no seed got to its end."""
        return badness(mean(self.test()), self.metric) if self.finished else math.inf

    def seconds(self) -> float:
        """Seconds of training of the fastest seed: other work on the machine only makes seeds slower."""
        return min((float(row["seconds"]) for row in self.finished), default=math.nan)

    def memory_mb(self) -> float:
        """What training took beside the loaded model and the rows, MiB: the median of the seeds.

        On a CPU that is resident memory, of a process that runs many cells: its first ones load libraries as well, and
        later ones may find what earlier ones have freed.
        """
        taken = [float(row["peak_memory_mb"]) - float(row["memory_before_mb"]) for row in self.finished]
        return median(taken) if taken else math.nan

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(queries, mean over the finished seeds) of ``loss`` or of the metric on the dev rows."""
        seeds = [{point["queries"]: point[name] for point in row["curve"]} for row in self.finished]
        common = sorted(set.intersection(*map(set, seeds))) if seeds else []
        return [(queries, mean(points[queries] for points in seeds)) for queries in common]

    def queries_to(self, loss: float) -> list[float]:
        """Queries of each seed until its dev loss is this low, along a line between evaluations; infinite: it never is.

        A seed that diverged never is.
        """
        curves = [[(point["queries"], point["loss"]) for point in row["curve"]] for row in self.rows]
        return [
            _first_below(curve, loss) if row["test"] is not None else math.inf
            for row, curve in zip(self.rows, curves, strict=True)
        ]


def _first_below(curve: list[tuple[float, float]], loss: float) -> float:
    """Where a curve is first at or below a value.

    Example:
        >>> _first_below([(0, 1.0), (10, 0.5)], 0.75)
        5.0
    """
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (q0, l0), (q1, l1) in pairwise(curve):
        if l1 <= loss < l0:
            return q0 + (q1 - q0) * (l0 - loss) / (l0 - l1)
    return math.inf


class Results:
    """All that a bench has found.

    Args:
        plan: the bench.
        rows: of the cells that are there.
        budget: queries of a run, one of the plan's; its own budget if left out.
    """

    def __init__(self, plan: Plan, rows: Mapping[Cell, Row], budget: int | None = None) -> None:
        self.plan = plan
        self.budget = plan.queries if budget is None else budget
        searches = rate_searches(plan, rows)
        rows = {cell: within(row, self.budget) for cell, row in rows.items()}
        self.groups: list[Group] = [(task, prompt) for task in plan.tasks for prompt in plan.prompts]
        self.untrained = {
            (group, mode): row
            for group in self.groups
            for mode in plan.modes
            if (row := rows.get(Cell(*group, mode))) is not None
        }
        self.results: dict[tuple[Group, str], MethodResult] = {}
        for group in self.groups:
            for method in plan.runs:
                search = searches[(*group, method)]
                cells = {factor: Cell(*group, method, factor, plan.seeds[0]) for factor in search.factors}
                rates = {factor: rows[cell] for factor, cell in cells.items() if cell in rows}
                chosen = search.chosen.get(self.budget)
                seeds = [] if chosen is None else [Cell(*group, method, chosen, s) for s in plan.seeds]
                if rates:
                    present = [rows[cell] for cell in seeds if cell in rows]
                    self.results[group, method] = MethodResult(method, present, rates, search, plan, self.budget)

    def of(self, group: Group) -> list[MethodResult]:
        """The methods of a task and prompt, the best test metric first."""
        results = [self.results[group, method] for method in self.plan.runs if (group, method) in self.results]
        return sorted(results, key=MethodResult.badness)

    def target(self, group: Group) -> float:
        """The dev loss that queries are counted to: the plan's, or the lowest of the baseline's mean curve."""
        if self.plan.target is not None:
            return self.plan.target
        baseline = self.results.get((group, self.plan.baseline))
        curve = baseline.curve("loss") if baseline else []
        lowest = min((loss for queries, loss in curve if queries), default=math.nan)
        return (
            lowest if curve and lowest < 0.99 * curve[0][1] else math.nan
        )  # a target that nothing was learnt to is none

    def gap(self, group: Group, method: str, reference: str) -> list[float]:
        """How far a method's best dev loss is above a reference's, nats, seed by seed; of the seeds both have."""
        losses: list[dict[int, float]] = []
        for name in (method, reference):
            result = self.results.get((group, name))
            points = [(row["seed"], best_point(row, self.plan.select)) for row in result.finished] if result else []
            losses.append({seed: point["loss"] for seed, point in points if point is not None})
        return [losses[0][seed] - losses[1][seed] for seed in sorted(losses[0].keys() & losses[1].keys())]

    def ranks(self, prompt: str) -> dict[str, float]:
        """Mean rank over the tasks by the mean test metric, 1 the best; equals share. References are not ranked.

        A method of which seeds diverged comes behind all of which fewer did; one with cells to come is left out.
        """
        groups = [group for group in self.groups if group[1] == prompt and self.of(group)]
        done = [{result.method for result in self.of(group) if not result.pending} for group in groups]
        ranked = set.intersection(*done) - set(self.plan.references) if done else set()
        ranks: dict[str, list[float]] = {}
        for group in groups:
            standings = {
                result.method: (len(self.plan.seeds) if result.diverges else result.broken, result.badness())
                for result in self.of(group)
                if result.method in ranked
            }
            for method, standing in standings.items():
                better = sum(other < standing for other in standings.values())
                equal = sum(other == standing for other in standings.values())
                ranks.setdefault(method, []).append(better + (equal + 1) / 2)
        return {method: mean(values) for method, values in ranks.items()}

    def robustness(self, method: str) -> dict[float, float]:
        """Factor in the plan -> mean over tasks and prompts of what it loses on the best of them, dev loss, nats.

        Of the first seed, at each run's best point; infinite where it diverges anywhere.
        """
        lost: dict[float, list[float]] = {}
        for group in self.groups:
            result = self.results.get((group, method))
            if result is None or not set(self.plan.rates) <= set(result.rates):
                continue
            losses = {factor: _dev_loss(row, self.plan) for factor, row in result.rates.items()}
            best = min(losses[factor] for factor in self.plan.rates)
            for factor, loss in ((factor, losses[factor]) for factor in self.plan.rates):
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
