"""Metric and loss of several groups of runs against what they cost: mean and interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.lm.metrics.intervals import mean_of_seeds
from zoft.report.plots import new_figure
from zoft.use.compare.runs import Group
from zoft.use.compare.table import NAME

AXES = {"queries": "queries (forward passes)", "seconds": "seconds", "tokens": "tokens read"}
"""What a run costs -> the words at the axis."""

_COLOURS = ("#2f6db5", "#c8553d", "#1f8a5b", "#8d5fb0", "#b58900", "#5b6470", "#d06c9e", "#3aa6a6")
_SCORES = ("eval_accuracy", "eval_f1", "eval_exact_match", "eval_reward", "eval_perplexity")
_MANY = 60  # points of a curve, about: a logged loss is shown by means of as many stretches


def picture(groups: Sequence[Group], folder: Path, axis: str = "queries") -> Path | None:
    """Draw compare.png, over a key of :data:`AXES`; None where no run has logged anything."""
    score = next((name for name in _SCORES if any(name in row for g in groups for r in g.runs for row in r.rows)), None)
    panels = [name for name in (score, "loss") if name is not None and any(curves(g, name, axis) for g in groups)]
    if not panels:
        return None
    # the legend has two groups a line: beyond six lines it takes no more from the panels
    figure = new_figure(5.6 * len(panels), 4.4 + 0.2 * max(0, math.ceil(len(groups) / 2) - 6))
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        percent = name == "eval_accuracy"
        for number, group in enumerate(groups):
            _draw(axes, curves(group, name, axis), _COLOURS[number % len(_COLOURS)], 100.0 if percent else 1.0, group)
        axes.set_title(("dev accuracy, %" if percent else name.replace("eval_", "dev ")), loc="left", fontsize=10.5)
        axes.set_xlabel(AXES[axis])
        if name == "eval_perplexity":
            axes.set_yscale("log")
        axes.grid(True, color="#e6e8ec", lw=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    # a run that logged no score has its line in the loss's panel alone
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    path = folder / f"{NAME}.png"
    figure.savefig(path)
    return path


def curves(group: Group, name: str, axis: str) -> list[tuple[float, float, float, float]]:
    """(cost, mean, low, high) over the seeds of a group, at every step that all its runs logged.

    A training loss, which is that of one batch, is averaged over stretches of the run.
    """
    runs = [
        {row["step"]: (row[axis], row[name]) for row in run.rows if _known(row, name) and _known(row, axis)}
        for run in group.runs
    ]
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    points = []
    length = 1 if name.startswith("eval_") else max(1, len(shared) // _MANY)
    for steps in (shared[start : start + length] for start in range(0, len(shared), length)):
        values = [_mean([run[step][1] for step in steps]) for run in runs]
        low, high = mean_of_seeds(values, name.removeprefix("eval_")) if len(values) > 1 else (math.nan, math.nan)
        points.append((_mean([run[steps[-1]][0] for run in runs]), _mean(values), low, high))
    return points


def _draw(axes: Any, points: list[tuple[float, float, float, float]], colour: str, scale: float, group: Group) -> None:
    if not points:
        return
    cost = [point[0] for point in points]
    seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
    alone = {"marker": "o"} if len(points) == 1 else {}  # a line of one point is not seen
    axes.plot(cost, [scale * point[1] for point in points], color=colour, lw=1.8, label=group.name + seeds, **alone)
    if len(group.runs) > 1:
        axes.fill_between(
            cost, *([scale * point[k] for point in points] for k in (2, 3)), color=colour, alpha=0.15, lw=0
        )


def _known(row: dict[str, Any], name: str) -> bool:
    return isinstance(row.get(name), int | float) and math.isfinite(row[name])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
