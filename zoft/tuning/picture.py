"""The picture of a search: what was found against evaluations, and the metric against each parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.report.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT = "tune.png"

_BLUE, _RED, _GREY, _INK = "#2f6db5", "#c0503a", "#8a8f98", "#2b2f36"
_MOST_PARAMETERS = 8


def draw_tuning(path: Path, result: Mapping[str, Any], metric: str, title: str = "") -> Path:
    """Draw what `results.json` holds.

    Args:
        path: the PNG.
        result: of :meth:`zoft.tuning.evaluation.TuneResult.as_dict`.
        metric: what a value is called.
        title: above the panels.
    """
    names = list(result["space"])[:_MOST_PARAMETERS]
    across = min(4, 1 + len(names))
    down = -(-(1 + len(names)) // across)
    figure = new_figure(3.5 * across, 3.1 * down, dpi=130)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    points = [e for e in result["evaluations"] if e["value"] is not None]
    shown = _limits([e["value"] for e in points])
    _draw_course(panels[0], points, result["direction"], metric)
    for panel, name in zip(panels[1:], names, strict=False):
        _draw_parameter(panel, points, name, str(result["space"][name]))
    for panel in panels[: 1 + len(names)]:
        if shown:
            panel.set_ylim(*shown)
    for panel in panels[1 + len(names) :]:
        panel.set_axis_off()
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=_INK)
    return save_figure(figure, path)


def _limits(values: Sequence[float]) -> tuple[float, float] | None:
    """The range of all but those that are far out, as a diverged run's is."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) < 4:
        return None
    quarter = len(finite) // 4
    low, high = finite[quarter], finite[-1 - quarter]
    reach = 3 * (high - low)
    inside = [value for value in finite if low - reach <= value <= high + reach]
    margin = 0.06 * (inside[-1] - inside[0]) or 1.0
    return inside[0] - margin, inside[-1] + margin


def _draw_course(axes: Axes, points: Sequence[Mapping[str, Any]], direction: str, metric: str) -> None:
    _dress(axes, "point", metric)
    better = min if direction == "minimize" else max
    best, course = None, []
    for e in points:
        if e["status"] == "done":
            best = e["value"] if best is None else better(best, e["value"])
        course.append(math.nan if best is None else best)
    axes.step([e["number"] for e in points], course, where="post", color=_BLUE, lw=2, label="best so far")
    for status, colour, mark in (("done", _GREY, "o"), ("stopped", _RED, "x")):
        some = [e for e in points if e["status"] == status]
        if some:
            numbers, values = [e["number"] for e in some], [e["value"] for e in some]
            axes.plot(numbers, values, mark, ms=4, color=colour, label=status)
    axes.legend(frameon=False, fontsize=8)


def _draw_parameter(axes: Axes, points: Sequence[Mapping[str, Any]], name: str, written: str) -> None:
    _dress(axes, name, "")
    if written.startswith("log"):
        axes.set_xscale("log")
    is_choice = written.startswith("choice")
    for status, colour, mark in (("done", _BLUE, "o"), ("stopped", _RED, "x")):
        some = [e for e in points if e["status"] == status]
        values = [str(e["point"][name]) if is_choice else e["point"][name] for e in some]
        axes.plot(values, [e["value"] for e in some], mark, ms=4, color=colour, alpha=0.8)


def _dress(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below, color=_INK, fontsize=9)
    axes.set_ylabel(beside, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
