"""Figures behind an accuracy: precision, recall and F1 of each class, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST = 64
"""Classes that are told apart; more would be no table to read."""


def by_class(labels: Sequence[int], chosen: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Figures of every class, and the confusion matrix.

    Args:
        labels: the right class of each row.
        chosen: what was chosen.
        names: of the classes.

    Returns:
        ``classes``: name -> precision, recall, f1 and num_rows, None where there is nothing to divide by;
        ``confusion``: rows of right classes, columns of chosen ones, as counts; ``macro_f1``: the mean F1 of the
        classes that have rows, where a class that is never chosen counts 0.

    Example:
        >>> found = by_class([0, 0, 1, 1], [0, 1, 1, 1], ["ham", "spam"])
        >>> found["confusion"], found["classes"]["ham"]["recall"], round(found["macro_f1"], 3)
        ([[1, 1], [0, 2]], 0.5, 0.733)
    """
    counts = [[0] * len(names) for _ in names]
    for label, choice in zip(labels, chosen, strict=True):
        counts[label][choice] += 1
    classes = {name: _figures(counts, place) for place, name in enumerate(names)}
    scores = [figures["f1"] or 0.0 for figures in classes.values() if figures["num_rows"]]
    return {"classes": classes, "confusion": counts, "macro_f1": sum(scores) / len(scores) if scores else None}


def _figures(counts: list[list[int]], place: int) -> dict[str, float | None]:
    right, wanted, taken = counts[place][place], sum(counts[place]), sum(row[place] for row in counts)
    # F1 = 2 tp / (2 tp + fp + fn)
    return {
        "precision": _ratio(right, taken),
        "recall": _ratio(right, wanted),
        "f1": _ratio(2 * right, wanted + taken),
        "num_rows": wanted,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def table(scores: dict[str, Any], width: int = 16, room: int | None = None) -> list[str]:
    """The figures for people: a line for every class, with what its rows were taken for.

    Args:
        scores: of :func:`by_class`.
        width: characters of a class's name; a longer one is cut.
        room: characters of a line; where a column for each class is wider, the commonest mistakes are named instead.

    Example:
        >>> print(chr(10).join(table(by_class([0, 0, 1, 1], [0, 1, 1, 1], ["ham", "spam"]))))
        class    rows  precision   recall     F1  taken for:     ham    spam
        ham         2    100.0 %   50.0 %  0.667                   1       1
        spam        2     66.7 %  100.0 %  0.800                   0       2
    """
    names = [name if len(name) <= width else f"{name[: width - 1]}~" for name in scores["classes"]]
    first = max(5, *map(len, names))
    head = f"{'class':<{first}}  {'rows':>6}  {'precision':>9}  {'recall':>7}  {'F1':>5}  taken for:"
    lines = [head + "".join(f"  {name:>6}" for name in names)]
    wide = room is not None and len(lines[0]) > room
    if wide:
        lines = [head.removesuffix(":")]
    for name, figures, counts in zip(names, scores["classes"].values(), scores["confusion"], strict=True):
        columns = [
            f"{figures['num_rows']:>6,}",
            f"{_percent(figures['precision']):>9}",
            f"{_percent(figures['recall']):>7}",
        ]
        columns.append(f"{'-' if figures['f1'] is None else format(figures['f1'], '.3f'):>5}")
        figures_of = f"{name:<{first}}  {'  '.join(columns)}"
        cells = "".join(f"  {count:>{max(6, len(other))},}" for count, other in zip(counts, names, strict=True))
        mistakes = "  " + _mistakes(name, counts, names, (room or 0) - len(figures_of) - 2)
        lines.append((figures_of + (mistakes if wide else f"            {cells}")).rstrip())
    return lines


def _mistakes(name: str, counts: Sequence[int], names: Sequence[str], room: int) -> str:
    """The classes that a class's rows were taken for, the commonest first, as many as there is room for."""
    taken = sorted(zip(counts, names, strict=True), key=lambda pair: -pair[0])
    said = [f"{other} {count:,}" for count, other in taken if count and other != name]
    while len(said) > 1 and len(", ".join(said)) > room:
        said = [*said[: -1 - (said[-1] == "...")], "..."]
    return ", ".join(said)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
