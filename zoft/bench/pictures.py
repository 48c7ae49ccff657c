"""A bench in pictures: metric against queries, ranks under each prompt, learning rates, gaps to the references."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from zoft.bench.ledger import Row
from zoft.bench.plan import Cell, Plan
from zoft.bench.results import Results
from zoft.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES, RANKS, RATES, GAPS, BUDGETS = "curves.png", "ranks.png", "rates.png", "gaps.png", "budgets.png"

_INK, _PALE, _GRID = "#2b2f36", "#6b7079", "#e6e8ec"
_DPI = 130
_DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (1, 3)))
_REFERENCES = {"forward_gradient": "#8e5ea2", "adamw": "#d9603b", "lora": "#e0a458"}
_KNOWN = {"mezo": "#2b2f36", "zoft": "#1f8a5b"}
_COLOURS = (
    "#2f6db5",
    "#c0503a",
    "#4f9bd9",
    "#c98a1b",
    "#5aa6a0",
    "#9c5577",
    "#7a9a3a",
    "#b08968",
    "#5b6abf",
    "#d07aa5",
)


def draw(plan: Plan, rows: Mapping[Cell, Row]) -> list[Path]:
    """Draw the pictures that the results suffice for into the bench's folder."""
    results, folder = Results(plan, rows), Path(plan.output_dir)
    drawn = []
    if any(results.of(group) for group in results.groups):
        drawn += [_curves(results, folder / CURVES), _rates(results, folder / RATES)]
        if plan.budgets:
            drawn.append(_budgets(plan, rows, folder / BUDGETS))
    if measured := _distances(results):
        drawn.append(_gaps(results, measured, folder / GAPS))
    if len(plan.prompts) > 1 and any(map(results.ranks, plan.prompts)):
        drawn.append(_ranks(results, folder / RANKS))
    return drawn


def colours(plan: Plan) -> dict[str, str]:
    """Method -> colour, the same in every picture."""
    known = {**_REFERENCES, **_KNOWN}
    free = iter(_COLOURS)
    return {method: known.get(method) or next(free, "#8a8f98") for method in plan.runs}


def _curves(results: Results, file: Path) -> Path:
    """Tasks down, prompts across: the dev metric against queries, mean over the seeds."""
    plan = results.plan
    colour = colours(plan)
    tasks = [task for task in plan.tasks if any(results.of((task, prompt)) for prompt in plan.prompts)]
    figure = new_figure(4.4 * len(plan.prompts) + 1.6, 2.9 * len(tasks) + 0.5, _DPI)
    panels = figure.subplots(len(tasks), len(plan.prompts), squeeze=False, sharex=True, sharey="row")
    handles: dict[str, Any] = {}
    for panel, group in zip(panels.flat, [(task, prompt) for task in tasks for prompt in plan.prompts], strict=True):
        _dress(panel)
        metric, scale = "metric", 1.0
        for result in results.of(group):
            if result.finished:
                metric = result.metric
                scale = 100.0 if metric == "accuracy" else 1.0
                queries, values = zip(*result.curve(metric), strict=True)
                style: Any = (0, (4, 2)) if result.method in plan.references else "-"
                (line,) = panel.plot(
                    queries, [scale * v for v in values], color=colour[result.method], linewidth=1.7, linestyle=style
                )
                handles[result.method] = line
        handles |= _draw_untrained(panel, results, group)
        unit = ", %" if metric == "accuracy" else ""
        panel.set_title(f"{group[0]}, prompt {group[1]}: dev {metric}{unit}", loc="left", fontsize=10, color=_INK)
    for panel in panels[-1]:
        panel.set_xlabel("queries (forward passes)", color=_INK)
    order = [name for name in (*plan.runs, *plan.modes) if name in handles]
    labels = [f"{name} (test rows)" if name in plan.modes else name for name in order]
    figure.legend([handles[name] for name in order], labels, loc="outside right upper", frameon=False, fontsize=9)
    return save_figure(figure, file)


def _budgets(plan: Plan, rows: Mapping[Cell, Row], file: Path) -> Path:
    """Tasks across, prompts down: the test metric at each budget, a learning rate for each; bars from seed to seed."""
    by_budget = {budget: Results(plan, rows, budget) for budget in plan.all_budgets}
    colour, last = colours(plan), by_budget[plan.queries]
    prompts = [prompt for prompt in plan.prompts if any(last.of((task, prompt)) for task in plan.tasks)]
    tasks = [task for task in plan.tasks if any(last.of((task, prompt)) for prompt in prompts)]
    figure = new_figure(4.1 * len(tasks) + 1.8, 3.2 * len(prompts) + 0.5, _DPI)
    panels = figure.subplots(len(prompts), len(tasks), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for panel, group in zip(panels.flat, [(task, prompt) for prompt in prompts for task in tasks], strict=True):
        _dress(panel)
        metric = "metric"
        for place, method in enumerate(plan.runs):
            curve = {b: r.results[group, method] for b, r in by_budget.items() if (group, method) in r.results}
            curve = {budget: result for budget, result in curve.items() if result.finished}
            if not curve:
                continue
            metric = next(iter(curve.values())).metric
            scale = 100.0 if metric == "accuracy" else 1.0
            middle = [scale * mean(result.test()) for result in curve.values()]
            below = [m - scale * min(result.test()) for m, result in zip(middle, curve.values(), strict=True)]
            above = [scale * max(result.test()) - m for m, result in zip(middle, curve.values(), strict=True)]
            at = [budget * (1 + 0.012 * (place - len(plan.runs) / 2)) for budget in curve]  # bars beside each other
            style: Any = (0, (4, 2)) if method in plan.references else "-"
            look = {"color": colour[method], "lw": 1.6, "ls": style, "marker": "o", "ms": 3.5, "elinewidth": 0.8}
            handles[method] = panel.errorbar(at, middle, [below, above], **look)
        handles |= _draw_untrained(panel, last, group)
        unit = ", %" if metric == "accuracy" else ""
        panel.set_title(f"{group[0]}, prompt {group[1]}: test {metric}{unit}", loc="left", fontsize=10, color=_INK)
        panel.set_xscale("log")
        panel.set_xticks(plan.all_budgets, [str(budget) for budget in plan.all_budgets])
        panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel("queries (forward passes)", color=_INK)
    order = [name for name in (*plan.runs, *plan.modes) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", frameon=False, fontsize=9)
    return save_figure(figure, file)


def _draw_untrained(panel: Any, results: Results, group: tuple[str, str]) -> dict[str, Any]:
    """A line across for each way of asking the untrained model; by its name, for the legend."""
    lines = {}
    for mode, dashes in zip(results.plan.modes, _DASHES, strict=False):
        row = results.untrained.get((group, mode))
        if row is not None:
            score = row["test"][row["metric"]] * (100.0 if row["metric"] == "accuracy" else 1.0)
            lines[mode] = panel.axhline(score, color="#8a8f98", lw=1.2, ls=dashes)
    return lines


def _ranks(results: Results, file: Path) -> Path:
    """One line a method from prompt to prompt, by its mean rank over the tasks."""
    plan = results.plan
    colour, ranks = colours(plan), [results.ranks(prompt) for prompt in plan.prompts]
    figure = new_figure(2.2 + 2.4 * len(plan.prompts), 4.6, _DPI)
    panel = figure.subplots()
    _dress(panel)
    for method in plan.runs:
        if all(method in rank for rank in ranks):
            places = [rank[method] for rank in ranks]
            panel.plot(range(len(places)), places, "-o", color=colour[method], lw=2, ms=6, mec="white")
    for at, side, offset in ((0, "right", -8), (len(ranks) - 1, "left", 8)):
        for names, place in _together(ranks[at]):
            panel.annotate(
                names,
                (at, place),
                (offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=9,
                color=_INK,
            )
    panel.set_xticks(range(len(ranks)), [f"prompt {prompt}" for prompt in plan.prompts])
    panel.set_xlim(-0.9, len(ranks) - 0.1)
    panel.invert_yaxis()
    panel.set_title("mean rank by test metric, 1 is best", loc="left", fontsize=10, color=_INK)
    return save_figure(figure, file)


def _together(ranks: Mapping[str, float]) -> list[tuple[str, float]]:
    """(names, rank): methods of one rank share a label."""
    places: dict[float, list[str]] = {}
    for method, rank in ranks.items():
        places.setdefault(rank, []).append(method)
    return [(", ".join(names), rank) for rank, names in places.items()]


def _rates(results: Results, file: Path) -> Path:
    """What a learning rate costs against the best of those tried, per method."""
    plan = results.plan
    colour = colours(plan)
    figure = new_figure(8.2, 4.4, _DPI)
    panel = figure.subplots()
    _dress(panel)
    lost = {method: results.robustness(method) for method in plan.runs}
    finite = [value for values in lost.values() for value in values.values() if math.isfinite(value)]
    top = 1.08 * max(finite, default=1.0) or 1.0
    for method, values in lost.items():
        if not values:
            continue
        shown = [min(value, top) for value in values.values()]
        style: Any = (0, (4, 2)) if method in plan.references else "-"
        panel.plot(list(values), shown, marker="o", ms=4, lw=1.7, color=colour[method], label=method, ls=style)
        broke = [factor for factor, value in values.items() if not math.isfinite(value)]
        panel.plot(broke, [top] * len(broke), "x", ms=9, mew=2, color=colour[method])
    panel.set_xscale("log")
    panel.set_xticks(plan.rates, [f"x {rate:g}" for rate in plan.rates], minor=False)
    panel.minorticks_off()
    panel.set_yscale("symlog", linthresh=0.1)
    panel.set_ylim(bottom=-0.02)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("learning rate, times the one in the plan", color=_INK)
    panel.set_title(
        "dev loss above that of the best of these rates, nats (first seed, best point of each run)",
        loc="left",
        fontsize=10,
        color=_INK,
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return save_figure(figure, file)


def _distances(results: Results) -> dict[str, dict[str, list[float]]]:
    """Title of a panel -> method -> a number for each task and prompt; what was not measured is left out."""
    distances = {
        "dev loss above the forward gradient's\n(for mezo: finite-difference noise), nats": _gaps_to(
            results, "forward_gradient"
        ),
        "dev loss above first-order AdamW's\n(noise of the directions), nats": _gaps_to(results, "adamw"),
        "queries to the target\n(a seed that fails counts 1.05 x budget)": _queries(results),
    }
    return {title: values for title, values in distances.items() if any(values.values())}


def _gaps(results: Results, measured: dict[str, dict[str, list[float]]], file: Path) -> Path:
    """Per method: dev loss above the references, and queries to the target; a dot a task and prompt."""
    plan = results.plan
    colour = colours(plan)
    methods = [method for method in reversed(plan.runs) if any(values.get(method) for values in measured.values())]
    figure = new_figure(3.5 * len(measured) + 1.2, 0.36 * len(methods) + 1.4, _DPI)
    for panel, (title, values) in zip(
        figure.subplots(1, len(measured), sharey=True, squeeze=False)[0], measured.items(), strict=True
    ):
        _dress(panel)
        for place, method in enumerate(methods):
            numbers = values.get(method, [])
            panel.plot(numbers, [place] * len(numbers), "o", ms=4, color=colour[method], alpha=0.55, mew=0)
            if numbers:
                panel.plot(mean(numbers), place, "|", ms=13, mew=2.4, color=colour[method])
        panel.set_yticks(range(len(methods)), methods, fontsize=9)
        panel.set_title(title, loc="left", fontsize=10, color=_INK)
    return save_figure(figure, file)


def _gaps_to(results: Results, reference: str) -> dict[str, list[float]]:
    return {
        method: [mean(gaps) for group in results.groups if (gaps := results.gap(group, method, reference))]
        for method in results.plan.runs
        if method != reference
    }


def _queries(results: Results) -> dict[str, list[float]]:
    plan, queries = results.plan, dict[str, list[float]]()
    for (group, method), result in results.results.items():
        if result.finished and math.isfinite(results.target(group)):
            queries.setdefault(method, []).append(mean(_capped(result.queries_to(results.target(group)), plan.queries)))
    return queries


def _capped(values: list[float], most: float) -> list[float]:
    """A seed that does not get there counts as a little more than the budget."""
    return [min(value, 1.05 * most) for value in values]


def _dress(axes: Axes) -> None:
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c5c9d0")
