"""The learning curve: loss and accuracy against queries, as a PNG in the run's folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.lm.metrics.intervals import wilson
from zoft.utils.files import write_filled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "curve.png"

BLUE, GREEN, GREY, INK = "#2f6db5", "#1f8a5b", "#8a8f98", "#2b2f36"
_SMOOTHING = 10  # the running mean spans one tenth of the logged rows


def learning_curve(
    folder: str | Path,
    *,
    title: str | None = None,
    zero_shot: float | None = None,
    num_eval_rows: int | None = None,
    metric: str = "accuracy",
    final: float | None = None,
) -> Path | None:
    """Draw `metrics.jsonl` into `curve.png`.

    Left the training loss (its points, and a running mean over a tenth of the run) and the evaluation loss;
    right the metric, with its 95 % Wilson interval when it is a proportion of a known number of rows.

    Args:
        folder: a run's output_dir.
        title: above both panels; the folder's name when None.
        zero_shot: the metric before training, drawn as a dashed line.
        num_eval_rows: rows that were evaluated; gives the accuracy its interval.
        metric: the logged metric, without `eval_`.
        final: the metric on the test rows at the end, a star behind the curve.

    Returns:
        The PNG's path, or None when no row has a number of queries and something to draw against it.
    """
    from zoft.report.results import read_metrics

    rows = read_metrics(folder)
    losses = _series(rows, "loss")
    eval_losses = _series(rows, "eval_loss")
    scores = _series(rows, f"eval_{metric}")
    if not (losses or eval_losses or scores):
        return None
    both = bool(losses or eval_losses) and bool(scores)
    figure = new_figure(10.5 if both else 5.8, 4.2, w_pad=0.12, h_pad=0.08, wspace=0.04)
    panels = iter(figure.subplots(1, 2 if both else 1, squeeze=False, sharex=True)[0])
    if losses or eval_losses:
        _draw_loss(next(panels), losses, eval_losses)
    if scores:
        _draw_metric(next(panels), scores, metric, zero_shot, final, num_eval_rows)
    name = title or Path(folder).resolve().name
    figure.suptitle(name, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return save_figure(figure, Path(folder) / CURVE)


def new_figure(width: float, height: float, dpi: int = 150, **padding: Any) -> Figure:
    """A white figure, in inches; ``padding`` as of matplotlib's ConstrainedLayoutEngine."""
    # A Figure of its own, not pyplot: no global state, no backend to choose, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(**padding)
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG; a reader never sees half a picture."""
    write_filled(path, lambda file: figure.savefig(file, format="png"))
    return path


def running_mean(values: list[float], window: int) -> list[float]:
    """The centred mean of each value and its neighbours; near the ends of as many as there are on both sides.

    Args:
        values: in order.
        window: how many values one mean spans, >= 1; an even window counts as the next odd one.

    Returns:
        As many means as values.

    Example:
        >>> running_mean([0.0, 3.0, 6.0, 0.0], window=3)
        [0.0, 3.0, 3.0, 0.0]
    """
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)  # symmetric, so that a trend is not bent at the ends
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(queries, value) of the rows that have both, finite."""
    return [
        (row["queries"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name]) and "queries" in row
    ]


def _draw_loss(axes: Axes, losses: list[tuple[float, float]], eval_losses: list[tuple[float, float]]) -> None:
    dress(axes, "loss")
    if losses:
        queries, values = [q for q, _ in losses], [v for _, v in losses]
        few = len(losses) < 40
        axes.plot(queries, values, "o", ms=3.2, mew=0, color=BLUE, alpha=0.6 if few else 0.28, label="training batch")
        if len(losses) > 2:
            window = max(3, len(losses) // _SMOOTHING)
            smooth, ends = running_mean(values, window), window // 4  # at the very ends the mean is of too few to show
            inner = slice(ends, len(values) - ends)
            axes.plot(queries[inner], smooth[inner], color=BLUE, lw=2, solid_capstyle="round", label="running mean")
    if eval_losses:
        axes.plot(*zip(*eval_losses, strict=True), "-D", ms=4, lw=1.2, mec="white", mew=0.6, color=GREY, label="dev")
    legend(axes)


def _draw_metric(
    axes: Axes,
    scores: list[tuple[float, float]],
    metric: str,
    zero_shot: float | None,
    final: float | None,
    num_rows: int | None,
) -> None:
    """The curve and its marks; every number stands in the legend below, where no line can cross it."""
    percent = metric == "accuracy"
    dress(axes, "accuracy, %" if percent else metric)
    scale = 100.0 if percent else 1.0

    def said(value: float) -> str:
        return f"{scale * value:.1f} %" if percent else f"{value:.3f}"

    queries, values = [q for q, _ in scores], [v * scale for _, v in scores]
    if percent and num_rows:
        bounds = [wilson(v * num_rows, num_rows) for _, v in scores]
        low, high = [scale * b[0] for b in bounds], [scale * b[1] for b in bounds]
        axes.fill_between(queries, low, high, color=GREEN, alpha=0.15, lw=0, label=f"95 % interval, {num_rows:,} rows")
    label = f"dev, at the end {said(scores[-1][1])}"
    axes.plot(queries, values, "-o", ms=5, mec="white", mew=0.8, lw=2, color=GREEN, label=label)
    if zero_shot is not None:
        axes.axhline(zero_shot * scale, color=GREY, lw=1.4, ls=(0, (4, 3)), label=f"test, before {said(zero_shot)}")
    if final is not None:
        star: dict[str, Any] = {"marker": "*", "s": 130, "color": BLUE, "edgecolor": "white", "lw": 0.8, "zorder": 4}
        axes.scatter([queries[-1]], [final * scale], label=f"test, final model {said(final)}", **star)
    legend(axes)


def dress(axes: Axes, quantity: str) -> None:
    """Frame, grid, title and axis of queries, as every picture has them."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel("queries (forward passes)", color=INK)
    axes.set_title(quantity, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, color="#e6e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(y=0.09)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5c9d0")


def legend(axes: Axes) -> None:
    """Put the legend below the panel: inside it a curve may go anywhere."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.17)}
    axes.legend(**place, ncols=2, fontsize=8.5, frameon=False, labelcolor=INK, columnspacing=1.4, handletextpad=0.6)
