"""The picture of a run's diagnostics: cosine, signal-to-noise, variance against q, error against eps, Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.diagnostics.variance import VarianceRow
from zoft.report.plots import BLUE, GREEN, GREY, INK, dress, legend, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "diagnostics.png"

Series = list[tuple[float, float]]
Panel = Callable[["Axes"], None]


def draw_diagnostics(folder: str | Path, rows: Sequence[dict[str, str]], tables: dict[str, Any]) -> Path | None:
    """Draw diagnostics.png: up to four panels, one for each thing that was measured.

    Args:
        folder: a run's output_dir.
        rows: of diagnostics.csv, as text.
        tables: of diagnostics.json.

    Returns:
        The PNG's path, or None where nothing was measured.
    """
    panels = _panels(rows, tables)
    if not panels:
        return None
    columns, lines = min(2, len(panels)), -(-len(panels) // 2)
    figure = new_figure(5.25 * columns, 3.9 * lines + 0.3, w_pad=0.12, h_pad=0.1, wspace=0.04)
    places = figure.subplots(lines, columns, squeeze=False).ravel()
    for place, panel in zip(places, panels, strict=False):
        panel(place)
    for place in places[len(panels) :]:
        place.set_visible(False)
    name = f"{Path(folder).resolve().name}, diagnostics"
    figure.suptitle(name, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return save_figure(figure, Path(folder) / PICTURE)


def _panels(rows: Sequence[dict[str, str]], tables: dict[str, Any]) -> list[Panel]:
    panels: list[Panel] = []
    cosines, ratios = _series(rows, "cosine"), _series(rows, "snr")
    if cosines or ratios:
        panels.append(lambda axes: _draw_alignment(axes, cosines, _series(rows, "cosine_by_chance"), ratios))
    if tables.get("variance"):
        panels.append(lambda axes: _draw_variance(axes, tables["variance"], tables["step"]))
    errors = [row for row in tables.get("radius", {}).get("rows", ()) if row["error"]]
    if errors:
        radii = [float(row["eps"]) for row in rows if row["eps"]]
        panels.append(lambda axes: _draw_radius(axes, errors, radii[-1] if radii else None, tables))
    if len(tables.get("gram", ())) > 1:
        panels.append(lambda axes: _draw_gram(axes, tables["gram"], tables["step"]))
    return panels


def _series(rows: Sequence[dict[str, str]], name: str) -> Series:
    """(queries, |value|) where there is a positive, finite one."""
    pairs = [(float(row["num_queries"]), abs(float(row[name]))) for row in rows if row.get(name)]
    return [(x, y) for x, y in pairs if math.isfinite(y) and y > 0]


def _draw_alignment(axes: Axes, cosines: Series, by_chance: Series, ratios: Series) -> None:
    dress(axes, "|cosine| of estimate and gradient; signal-to-noise of probes")
    _log_y(axes)
    if cosines:
        axes.plot(*zip(*cosines, strict=True), "-o", ms=4, lw=1.4, color=BLUE, label="|cosine|")
    if cosines and by_chance:
        axes.plot(*zip(*by_chance, strict=True), color=GREY, lw=1.4, ls=(0, (4, 3)), label="√(q / d)")
    if ratios:
        axes.plot(*zip(*ratios, strict=True), "-D", ms=3.5, lw=1.2, color=GREEN, label="|mean| / std of probes")
    legend(axes)


def _draw_variance(axes: Axes, table: Sequence[VarianceRow], step: int) -> None:
    dress(axes, f"mean square of the estimate against q, step {step}")
    _both_log(axes, "directions q")
    counts, squares = [row["num_directions"] for row in table], [row["mean_square"] for row in table]
    bars = [row["standard_error"] or 0.0 for row in table]
    axes.errorbar(counts, squares, bars, fmt="o", ms=5, lw=1.2, color=BLUE, label="measured ± standard error")
    theory = [(row["num_directions"], row["theory"]) for row in table if row["theory"]]
    if theory:
        axes.plot(*zip(*theory, strict=True), color=GREY, lw=1.4, ls=(0, (4, 3)), label="theory")
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    legend(axes)


def _draw_radius(axes: Axes, rows: Sequence[dict[str, float]], radius: float | None, tables: dict[str, Any]) -> None:
    exact = {"jvp": "the exact JVP", "gradient": "the gradient's"}[tables["radius"]["exact"]]
    dress(axes, f"finite difference against {exact}, relative error, step {tables['step']}")
    _both_log(axes, "eps")
    axes.plot([row["eps"] for row in rows], [row["error"] for row in rows], "-o", ms=5, lw=1.6, color=BLUE)
    if radius:
        axes.axvline(radius, color=GREEN, lw=1.4, ls=(0, (4, 3)), label=f"the run's eps, {radius:.3g}")
        legend(axes)


def _draw_gram(axes: Axes, gram: Sequence[Sequence[float]], step: int) -> None:
    import numpy

    values = numpy.array([[math.nan if x is None else x for x in row] for row in gram], dtype=float)
    off = values - numpy.diag(numpy.diag(values))
    most = float(numpy.nanmax(numpy.abs(off))) or 1.0
    numpy.fill_diagonal(off, math.nan)  # 1 by definition
    dress(axes, f"cosines between directions, step {step}")
    axes.grid(False)
    axes.set_facecolor("#e6e8ec")
    image = axes.imshow(off, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_xlabel("direction", color=INK)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, colors=INK)


def _both_log(axes: Axes, quantity: str) -> None:
    axes.set_xscale("log")
    axes.tick_params(axis="x", which="minor", length=0)
    _log_y(axes)
    axes.set_xlabel(quantity, color=INK)


def _log_y(axes: Axes) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
