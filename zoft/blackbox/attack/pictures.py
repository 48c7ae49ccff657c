"""Pictures of attacks: original, perturbation and adversarial image side by side; success rate against queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoft.blackbox.attack.attack import ImageOutcome
from zoft.report.plots import new_figure
from zoft.utils.files import write_filled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 6
_INK, _GREY = "#2b2f36", "#6b7079"
_COLOURS = ("#2f6db5", "#c8553d", "#1f8a5b", "#8a5fb0", "#b8860b", "#4a9ba8", "#8a8f98")


def some(outcomes: Sequence[ImageOutcome], count: int = _ROWS) -> list[ImageOutcome]:
    """A few to show: evenly over the queries that they took, so neither the easy nor the hard ones alone.

    Args:
        outcomes: of images that were tried, at least one.
        count: how many.
    """
    flipped = sorted((o for o in outcomes if o.success), key=lambda o: (o.num_queries, o.image)) or list(outcomes)
    places = np.linspace(0, len(flipped) - 1, min(count, len(flipped))).round().astype(int)
    return [flipped[place] for place in places]


def triplets(outcomes: Sequence[ImageOutcome], names: Sequence[str], path: Path) -> None:
    """Each image, what was added to it, and the sum; with the classifier's label and its probability.

    The perturbation is drawn around middle grey and scaled by a factor that is written above it.

    Args:
        outcomes: one row each; in two columns of rows from four on.
        names: of the labels.
        path: of the PNG.
    """
    columns = 2 if len(outcomes) >= 4 else 1
    rows = -(-len(outcomes) // columns)
    figure = new_figure(4.7 * columns, 1.85 * rows)
    groups = figure.subfigures(1, columns, squeeze=False)[0] if columns > 1 else [figure]
    for column, group in enumerate(groups):
        panels = group.subplots(rows, 3, squeeze=False)
        for row in range(rows):
            place = column * rows + row
            if place < len(outcomes):
                _triplet(panels[row], outcomes[place], names)
            else:
                for axes in panels[row]:
                    axes.axis("off")
    _save(figure, path)


def curves(
    methods: Mapping[str, Sequence[tuple[int, float, float, float]]], path: Path, *, budget: int, title: str = ""
) -> None:
    """Success rate against queries, stairs with their 95 % Wilson intervals.

    Args:
        methods: name -> rows (queries, rate, low, high), as :func:`zoft.blackbox.attack.report.curve` gives them.
        path: of the PNG.
        budget: where the lines end.
        title: above it.
    """
    figure = new_figure(6.6, 4.2)
    axes = figure.subplots()
    for number, (name, rows) in enumerate(methods.items()):
        colour, dashes = _COLOURS[number % len(_COLOURS)], "--" if number >= len(_COLOURS) else "-"
        ends = [*rows, (budget, *rows[-1][1:])]
        queries, rate, low, high = (list(column) for column in zip(*ends, strict=True))
        percent = [[100 * value for value in values] for values in (rate, low, high)]
        axes.step(queries, percent[0], where="post", color=colour, ls=dashes, lw=2, label=name)
        band = 0.15 if len(methods) <= 2 else 0.07
        axes.fill_between(queries, percent[1], percent[2], step="post", color=colour, alpha=band, lw=0)
    axes.set(xscale="log", xlim=(1, budget), ylim=(0, 101))
    axes.set_xlabel("queries for an image", color=_INK)
    axes.set_title(title or "images flipped, % (95 % intervals)", loc="left", fontsize=10.5, color=_INK)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, color="#e6e8ec", lw=0.8)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
    axes.legend(loc="upper left", fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none", labelcolor=_INK)
    _save(figure, path)


def save(image: np.ndarray, path: Path) -> None:
    """An image [c, h, w], numbers in [0, 1], as a PNG of its own size."""
    from PIL import Image

    levels = (_shown(image) * 255).round().astype(np.uint8)
    write_filled(path, lambda file: Image.fromarray(levels).save(file, format="PNG"))


def factor(outcome: ImageOutcome) -> float:
    """By how much a perturbation may be multiplied to be drawn: a round number, so that nothing is cut off."""
    largest = float(abs(outcome.adversarial - outcome.original).max())
    if not largest:
        return 1.0
    most = 0.5 / largest * (1 + 1e-6)
    return float(max(step for step in (1, 2, 2.5, 4, 5, 8, 10, 15, 20, 30, 50, 100) if step <= max(1.0, most)))


def _triplet(panels: Sequence[Any], outcome: ImageOutcome, names: Sequence[str]) -> None:
    times = factor(outcome)
    delta = outcome.adversarial.astype(np.float64) - outcome.original
    shown = (outcome.original, np.clip(0.5 + times * delta, 0, 1), outcome.adversarial)
    queries = f"{outcome.num_queries:,} queries"
    said = (
        f"{names[outcome.before[0]]}, {100 * outcome.before[1]:.1f} %",
        f"perturbation × {times:g}\n{queries}",
        f"{names[outcome.after[0]]}, {100 * outcome.after[1]:.1f} %" + ("" if outcome.success else "\n(not reached)"),
    )
    for axes, image, text in zip(panels, shown, said, strict=True):
        axes.imshow(_shown(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel(text, fontsize=8, color=_INK, labelpad=3)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#c5c9d0")
    panels[0].set_ylabel(f"image {outcome.image}", fontsize=7.5, color=_GREY)


def _shown(image: np.ndarray) -> np.ndarray:
    """[h, w] of one channel, [h, w, 3] of three; the first one of any other number."""
    return image.transpose(1, 2, 0) if len(image) == 3 else image[0]


def _save(figure: Figure, path: Path) -> None:
    write_filled(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
