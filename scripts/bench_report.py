"""What bench_step.py has measured, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
from bench_probes import PARTS
from matplotlib.figure import Figure

HEADER = ["size", "rows", "what moves", "q", "engine", "MeZO ms", "limit ms", "zoft ms", "x MeZO", "", "x limit", ""]
HEADER += ["queries/s", "MB M/l/z", "f/h/n/o % MeZO", "zoft"]
KEY = """\
times: medians of {rounds} rounds; x: medians of the ratio within a round, and its quartiles.
MeZO: one direction timed, times q. limit: 2q bare evaluations of zoft's objective. MB above the weights at the peak:
MeZO / limit / zoft. f/h/n/o: share of time in the decoder's forward / the head and the loss / noise (drawing and adding
it) / other."""

_INK, _GRID = "#2b2f36", "#e6e8ec"
_VARIANT = {
    "gaussian": ("#1d4e89", "all weights, Gaussian"),
    "rademacher": ("#4f9bd9", "all weights, Rademacher"),
    "low_rank": ("#1f8a5b", "all weights, low rank"),
    "lora": ("#c98a1b", "LoRA"),
    "prefix": ("#8e5ea2", "prefix"),
}
_INSIDE = {"color": "white", "size": 8, "weight": "bold"}
_PART = {"forward": "#2f6db5", "head": "#9cc3e8", "noise": "#d9603b", "other": "#a9aeb8"}


def slopes_of(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost per query at the most directions over that at one, zoft's and the limit's, and the slope of a line."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["size"], case["rows"], case["tokens"], case["variant"]), []).append(case)
    slopes = []
    for (size, rows, tokens, variant), group in groups.items():
        few, many = group[0], group[-1]
        if few["q"] != 1 or many["q"] == 1:
            continue
        per_query = {}
        for name in ("zoft", "limit"):
            pairs = zip(few["seconds"][name], many["seconds"][name], strict=True)
            per_query[name] = float(numpy.median([b / (many["q"] * a) for a, b in pairs]))
        times = [case["milliseconds"]["zoft"] for case in group]
        line = float(numpy.polyfit([case["q"] for case in group], times, 1)[0]) / times[0]
        about = {"size": size, "rows": rows, "tokens": tokens, "variant": variant, "q": many["q"]}
        slopes.append(about | {"per_query": per_query, "line": line})
    return slopes


# ---- table -----------------------------------------------------------------------------------------------------------


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _ratio(ratio: dict[str, float] | None) -> list[str]:
    return [f"{ratio['median']:.2f}", f"[{ratio['q1']:.2f}, {ratio['q3']:.2f}]"] if ratio else ["-", ""]


def _row(case: dict[str, Any]) -> list[str]:
    sides = ("mezo", "limit", "zoft")
    shares = [case["shares"].get(name) for name in ("mezo", "zoft")]
    return [
        *(case["size"], f"{case['rows']}x{case['tokens']}", case["variant"], str(case["q"]), case["engine"]),
        *(_number(case["milliseconds"].get(name), ".1f") for name in sides),
        *_ratio(case["x_mezo"]),
        *_ratio(case["x_limit"]),
        _number(case["queries_per_second"], ".1f"),
        "/".join(_number(case["peak_mb"].get(name), ".0f") for name in sides),
        *("/".join(f"{100 * share[part]:.0f}" for part in PARTS) if share else "-" for share in shares),
    ]


def table(result: dict[str, Any]) -> str:
    """Everything in words and columns."""
    rows = [HEADER, *map(_row, result["cases"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = sorted({case["rounds"] for case in result["cases"]})
    lines += ["", KEY.format(rounds="-".join(map(str, dict.fromkeys([*counts[:1], *counts[-1:]])))), ""]
    for slope in result["slopes"]:
        each = ", ".join(f"{name} {ratio:.3f}" for name, ratio in slope["per_query"].items())
        about = "{size} {rows}x{tokens} {variant}: cost per query at q={q} over q=1: {each}; slope of a line {line:.3f}"
        lines.append(about.format(each=each, **slope))
    for run in result["endurance"]:
        about = "{steps} steps, {variant} ({engine}): last tenth over first {ratio:.3f}, over the limit's {x_limit:.3f}"
        lines.append(about.format(**run))
    lines += ["SKIPPED {size} {variant}: {why}".format(**skip) for skip in result["skipped"]]
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in result["environment"].items() if v is not None)])


# ---- picture ---------------------------------------------------------------------------------------------------------


def draw(result: dict[str, Any], path: Path) -> None:
    """Speed-up over MeZO for every shape, and where the time of one query goes in one of them."""
    cases = [case for case in result["cases"] if case["x_mezo"]]
    if not cases:
        return
    beside = len({(case["size"], case["rows"]) for case in cases}) < 4
    figure = Figure(figsize=(13, 5 if beside else 9), dpi=150, facecolor="white", layout="constrained")
    grid = {"ncols": 2, "width_ratios": [1.25, 1]} if beside else {"nrows": 2}
    panels = figure.subplots(**grid)
    _draw_speedups(panels[0], cases)
    _draw_shares(panels[1], cases)
    about = result["environment"]
    where = about["gpu"] or f"{about['cpu']}, {about['threads']} threads"
    note = f"{where}, {about['dtype']}; torch {about['torch']}, zoft {about['zoft']}, {about['date']}"
    figure.supxlabel(note, fontsize=8, color="#6b7079", x=0.01, ha="left")
    figure.savefig(path)


def _draw_speedups(axes: Any, cases: list[dict[str, Any]]) -> None:
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        shape = f"{case['size']}\n{case['rows']} x {case['tokens']}, q = {case['q']}"
        if case["q"] == min(c["q"] for c in cases if c["size"] == case["size"] and c["rows"] == case["rows"]):
            shapes.setdefault(shape, {})[case["variant"]] = case
    variants = [v for v in _VARIANT if any(v in group for group in shapes.values())]
    width = 0.84 / len(variants)
    for place, group in enumerate(shapes.values()):
        for index, variant in enumerate(v for v in variants if v in group):
            x, ratio, colour = place - 0.42 + (index + 0.5) * width, group[variant]["x_mezo"], _VARIANT[variant][0]
            low, high = ratio["median"] - ratio["q1"], ratio["q3"] - ratio["median"]
            axes.bar(x, ratio["median"], width * 0.92, color=colour, yerr=[[low], [high]], ecolor=_INK)
            limit = group[variant]["limit_x_mezo"]["median"]
            axes.hlines(limit, x - width * 0.46, x + width * 0.46, color=_INK, lw=1.6)
            axes.annotate(f"{ratio['median']:.1f}", (x, 0), (0, 4), textcoords="offset points", ha="center", **_INSIDE)
    for variant in variants:
        axes.bar(0, 0, color=_VARIANT[variant][0], label=_VARIANT[variant][1])
    axes.bar(0, 0, 0.1, color=_INK, label="limit: the forwards alone")
    axes.axhline(1, color=_INK, lw=0.8, ls=":")
    axes.set_xticks(range(len(shapes)), list(shapes))
    axes.margins(y=0.1)
    _dress(axes, "times faster than MeZO's step, at equal queries", "y", columns=3)


def _draw_shares(axes: Any, cases: list[dict[str, Any]]) -> None:
    first = next((case for case in cases if case["size"] != "small"), cases[-1])
    same = [case for case in cases if all(case[key] == first[key] for key in ("size", "rows", "tokens", "q"))]
    bars: list[tuple[str, float, dict[str, float]]] = []
    for peft in dict.fromkeys(case["what"]["peft"] for case in same):
        group = [case for case in same if case["what"]["peft"] == peft]
        name = "all weights" if peft == "none" else _VARIANT[peft][1]
        bars.append((f"MeZO: {name}", group[0]["milliseconds"]["mezo"], group[0]["shares"]["mezo"]))
        bars += [(_VARIANT[c["variant"]][1], c["milliseconds"]["zoft"], c["shares"]["zoft"]) for c in group]
    for place, (_, milliseconds, shares) in enumerate(bars):
        per_query, start = milliseconds / (2 * first["q"]), 0.0
        for part in PARTS:
            length = per_query * shares[part]
            axes.barh(place, length, 0.72, left=start, color=_PART[part], label=part if place == 0 else None)
            start += length
        label = f"{per_query:.0f} ms" if per_query > 99 else f"{per_query:.2g} ms"
        axes.annotate(label, (start, place), (4, 0), textcoords="offset points", va="center", size=8.5)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    for tick, (name, _, _) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if name.startswith("MeZO") else "normal")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    shape = f"{first['size']}, {first['rows']} x {first['tokens']}, q = {first['q']}"
    _dress(axes, f"where the time of one query goes, ms ({shape})", "x", columns=4)


def _dress(axes: Any, title: str, grid: str, columns: int) -> None:
    axes.grid(True, axis=grid, color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == ("bottom" if grid == "y" else "left"))
        spine.set_color("#c5c9d0")
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0, "frameon": False}
    legend = axes.legend(ncols=columns, fontsize=8.5, labelcolor=_INK, columnspacing=1.4, **above)
    legend.set_title(title, {"size": 10.5})
    legend._legend_box.align = "left"
    legend.get_title().set_color(_INK)
