"""A row for every group of runs, as csv, Markdown and HTML."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoft.lm.metrics.intervals import mean_of_seeds
from zoft.report.report import complete_facts
from zoft.use.compare.runs import Group
from zoft.utils.files import write_atomically

COLUMNS = (
    "run",
    "seeds",
    "metric",
    "zero_shot",
    "final",
    "low",
    "high",
    "gain",
    "queries",
    "seconds",
    "tokens",
    "peak_mb",
)
NAME = "compare"


def table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row for each group; of a run that has not ended only its name and seeds are given.

    The interval of several seeds is Student's over the seeds; of one run, or of seeds that end alike, the report's own.
    """
    return [_row(group) for group in groups]


def _row(group: Group) -> dict[str, Any]:
    ended = [complete_facts(run.facts) for run in group.runs if "final" in run.facts]
    row: dict[str, Any] = {"run": group.name, "seeds": len(group.runs)}
    if not ended:
        return row | {"metric": "not finished"}
    values = [facts["final"] for facts in ended]
    # seeds that all end alike have no spread: the rows' own interval is what is known
    spread = len(set(values)) > 1
    low, high = mean_of_seeds(values, ended[0]["metric"]) if spread else ended[0].get("final_interval", [math.nan] * 2)
    zero = [facts["zero_shot"] for facts in ended if "zero_shot" in facts]
    row |= {"metric": ended[0]["metric"], "final": _mean(values), "low": low, "high": high}
    if zero:
        row |= {"zero_shot": _mean(zero), "gain": _mean(values) - _mean(zero)}
    names = {"queries": "num_queries", "seconds": "seconds", "tokens": "num_tokens", "peak_mb": "peak_memory_mb"}
    for column, fact in names.items():
        known = [facts[fact] for facts in ended if fact in facts]
        if known:
            row[column] = _mean(known)
    return row | {"seeds": len(ended)}


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """compare.csv, compare.md and compare.html."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = {"csv": text.getvalue(), "md": markdown(rows), "html": _html(rows)}
    for suffix, content in written.items():
        write_atomically(folder / f"{NAME}.{suffix}", content)
    return [folder / f"{NAME}.{suffix}" for suffix in written]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown, numbers as people read them."""
    cells = [_head(), *map(said, rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|:--" * len(cells[0]) + "|", *lines[1:]]) + "\n"


def plain(rows: Sequence[dict[str, Any]], room: int | None = None) -> str:
    """The table for a terminal ``room`` characters wide; columns that do not fit are left out (the files have them)."""
    cells = [_head(), *map(said, rows)]
    for name in ("", *_EXPENDABLE):
        columns = [place for place, title in enumerate(cells[0]) if title != name]
        cells = [[row[place] for place in columns] for row in cells]
        widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
        if room is None or sum(widths) + 2 * len(widths) - 2 <= room:
            break
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


_EXPENDABLE = ("peak", "time", "seeds", "queries")
"""Columns that a narrow terminal loses, in this order."""


def _head() -> list[str]:
    return ["run", "seeds", "metric", "before", "after", "gain", "queries", "time", "peak"]


def said(row: dict[str, Any]) -> list[str]:
    """The text of each cell of a row."""
    from zoft.report.text import duration, gib

    percent = row.get("metric") == "accuracy"
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")

    def number(name: str, sign: str = "") -> str:
        return f"{scale * row[name]:{sign}.{digits}f}" if name in row and math.isfinite(row[name]) else ""

    after = number("final") + (unit if "final" in row else "")
    if number("low"):
        after += f" [{number('low')}, {number('high')}]"
    gain = number("gain", "+") + (" points" if percent and "gain" in row else "")
    return [
        str(row["run"]),
        str(row["seeds"]),
        str(row.get("metric", "")),
        number("zero_shot") + (unit if "zero_shot" in row else ""),
        after,
        gain,
        f"{row['queries']:,.0f}" if "queries" in row else "",
        duration(row["seconds"]) if "seconds" in row else "",
        gib(row["peak_mb"]) if "peak_mb" in row else "",
    ]


def _html(rows: Sequence[dict[str, Any]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join([line(_head(), "th"), *(line(said(row), "td") for row in rows)])
    style = "body{font:15px sans-serif}td,th{padding:4px 12px;text-align:left;border-bottom:1px solid #ddd}"
    return (
        f"<!doctype html>\n<meta charset='utf-8'><title>runs compared</title>\n<style>{style}</style>\n"
        f"<table>\n{body}\n</table>\n<img src='{NAME}.png' alt='metric and loss'>\n"
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
