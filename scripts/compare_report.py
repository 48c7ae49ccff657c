"""What compare_estimators.py has run, as a table and as a picture."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

REFERENCES = {"mezo": "#2b2f36", "forward_gradient": "#8e5ea2", "adamw": "#d9603b"}
_OURS, _GREY, _GRID = "#1f8a5b", "#c3c7ce", "#e6e8ec"
_TOP = ("#1d4e89", "#4f9bd9", "#c98a1b", "#5aa6a0")

Cell = dict[str, Any]


class Row:
    """A method at its best learning rate, over its seeds.

    Args:
        cells: all of its cells.
    """

    def __init__(self, cells: list[Cell]) -> None:
        of_rate: dict[float, list[Cell]] = {}
        for cell in cells:
            of_rate.setdefault(cell["learning_rate"], []).append(cell)
        losses = {rate: mean(final_loss(cell) for cell in group) for rate, group in of_rate.items()}
        most = max(map(len, of_rate.values()))
        tried = [rate for rate, group in of_rate.items() if len(group) == most]  # as many seeds, to be fair
        best = min(tried, key=lambda rate: (losses[rate] > min(losses[r] for r in tried) + 1e-3, -rate))
        self.method: str = cells[0]["method"]
        self.rate = best
        self.cells = [cell for cell in cells if cell["learning_rate"] == self.rate]
        self.tried = sorted(of_rate)
        self.steps: int = self.cells[0]["steps"]
        self.queries_a_step: int = self.cells[0]["queries_a_step"]
        self.state: int = self.cells[0]["state_elements"]
        self.losses = [final_loss(cell) for cell in self.cells]
        self.accuracies = [cell["curve"][-1][2] for cell in self.cells]
        self.seconds = mean(cell["seconds"] for cell in self.cells)

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the largest or the smallest that was tried."""
        return len(self.tried) > 1 and self.rate in (self.tried[0], self.tried[-1])

    def queries_to(self, loss: float) -> float:
        """Queries until the mean dev loss over the seeds is this low (along a line between evaluations), or inf."""
        curve = self.curve()
        for (q0, l0, _), (q1, l1, _) in pairwise(curve):
            if l1 <= loss < l0:
                return q0 + (q1 - q0) * (l0 - loss) / (l0 - l1)
        return math.inf

    def curve(self) -> list[tuple[float, float, float]]:
        """(queries, loss, accuracy), means over the seeds."""
        of_seeds = [{queries: rest for queries, *rest in cell["curve"]} for cell in self.cells]
        common = sorted(set.intersection(*(set(points) for points in of_seeds)))
        at = {queries: [points[queries] for points in of_seeds] for queries in common}
        return [(q, mean(loss for loss, _ in values), mean(acc for _, acc in values)) for q, values in at.items()]


def final_loss(cell: Cell) -> float:
    """The loss on the dev rows at the end; infinite where the run broke."""
    loss = cell["curve"][-1][1]
    return math.inf if cell["failed"] or not math.isfinite(loss) else float(loss)


def rows_of(cells: list[Cell]) -> list[Row]:
    """Methods from best to worst."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    return sorted((Row(group) for group in by_method.values()), key=lambda row: mean(row.losses))


def table(rows: list[Row], trained: int) -> str:
    """The table, in Markdown."""
    mezo = next(row for row in rows if row.method == "mezo")
    target = mean(mezo.losses)
    start = mezo.curve()[0][1]
    lines = [
        "| method | learning rate | queries a step | steps | dev loss: mean (lowest, highest) | accuracy % | "
        "queries to MeZO's loss | kept / weight | seeds |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        reached = row.queries_to(target)
        queries = "-" if math.isinf(reached) else f"{reached:.0f}"
        low, high = min(row.losses), max(row.losses)
        helped = "" if mean(row.losses) < start else " (does not help)"
        rate = f"{row.rate:g}{' *' if row.at_edge else ''}"
        lines.append(
            f"| {row.method}{helped} | {rate} | {row.queries_a_step} | {row.steps} | "
            f"{mean(row.losses):.3f} ({low:.3f}, {high:.3f}) | {100 * mean(row.accuracies):.1f} | {queries} | "
            f"{row.state / trained:.2g} | {len(row.cells)} |"
        )
    lines += [
        "",
        f"Before training: dev loss {start:.3f}, accuracy {100 * mezo.curve()[0][2]:.1f} %. "
        "`*`: the best learning rate is at the edge of the grid.",
    ]
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Left: loss against queries; right: the final loss of every method, its seeds as dots."""
    figure = Figure(figsize=(13, 8.5), dpi=130, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    colours = dict(REFERENCES)
    if any(row.method == "vectors" for row in rows):
        colours["vectors"] = _OURS
    colours |= dict(zip([row.method for row in rows if row.method not in colours][:4], _TOP, strict=False))
    for row in reversed(rows):
        queries, losses, _ = zip(*row.curve(), strict=True)
        known = row.method in colours
        left.plot(
            queries,
            losses,
            color=colours.get(row.method, _GREY),
            linewidth=2 if known else 0.8,
            zorder=3 if known else 1,
            label=row.method if known else None,
        )
    start = rows[0].curve()[0][1]
    left.set(
        xlabel="queries (forward passes of the objective)",
        ylabel="loss on the dev rows, nats",
        ylim=(None, start * 1.1),
    )
    handles, labels = left.get_legend_handles_labels()
    order = [labels.index(row.method) for row in rows if row.method in labels]
    left.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=9)
    for place, row in enumerate(reversed(rows)):
        colour = colours.get(row.method, "#6b7079")
        right.plot(
            [min(x, start * 1.1) for x in row.losses], [place] * len(row.losses), "o", color=colour, markersize=4
        )
        right.plot(min(mean(row.losses), start * 1.1), place, "|", color=colour, markersize=11, markeredgewidth=2)
    right.axvline(start, color="#8a8f98", linewidth=1, linestyle="--")
    right.annotate(
        "before training",
        (start, len(rows) - 0.6),
        ha="right",
        fontsize=8,
        color="#6b7079",
        xytext=(-3, 0),
        textcoords="offset points",
    )
    right.set_yticks(range(len(rows)), [row.method for row in reversed(rows)], fontsize=8)
    right.set(xlabel="loss on the dev rows at the end, nats", ylim=(-0.8, len(rows) - 0.2))
    for panel in (left, right):
        panel.grid(color=_GRID)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
