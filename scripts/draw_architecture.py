"""Draw docs/architecture.svg from the code: layers from pyproject.toml, each room's sentence from its docstring.

Run it after a package is added or a layer moves: python scripts/draw_architecture.py
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
NOUNS = {"subspaces", "estimators", "weightings", "engines", "optimizers", "step", "journal"}
"""Drawn in green: one formula, five nouns, and the value that goes from hand to hand."""
WIDTH, HEIGHT, GAP = 10.0, 0.92, 0.16


def layers() -> list[list[str]]:
    """The layers of the import contract, top first, with only the rooms that exist."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = [re.split(r"\s*[|:]\s*", re.sub(r"[()]", "", layer)) for layer in names]
    rows = [[room for room in row if sentence(room) and not room.startswith("__")] for row in rows]
    return [row for row in rows if row]


def sentence(room: str) -> str:
    """The first line of a module's docstring, without what follows a semicolon."""
    for path in (ROOT / "zoft" / room / "__init__.py", ROOT / "zoft" / f"{room}.py"):
        if path.exists():
            text = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
            text = text.split(";")[0].rstrip(".")
            if text.lower().startswith(room[:6]) and ": " in text:  # "Engines: how ...": the name stands above it
                text = text.split(": ", 1)[1]
            return text[:1].upper() + text[1:]
    return ""


def main(path: Path = ROOT / "docs" / "architecture.svg") -> None:
    """Write the picture.

    Args:
        path: the file.
    """
    rows = layers()
    plt.rcParams |= {"svg.hashsalt": "zoft", "svg.fonttype": "none"}  # words stay words: small, searchable, testable
    figure, axes = plt.subplots(figsize=(12.5, 1.12 * len(rows)))
    for level, row in enumerate(rows):
        y = -level * (HEIGHT + GAP)
        width = (WIDTH - GAP * (len(row) - 1)) / len(row)
        for position, room in enumerate(row):
            x = position * (width + GAP)
            noun = room in NOUNS
            box = FancyBboxPatch(
                (x, y), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08",
                facecolor="#dcebe2" if noun else "#eef1f5", edgecolor="#1f8a5b" if noun else "#8a8f98",
            )  # fmt: skip
            axes.add_patch(box)
            axes.text(x + width / 2, y + HEIGHT - 0.2, room, ha="center", va="center", weight="bold", size=10.5)
            lines = textwrap.wrap(sentence(room), max(16, int(width * 12.5)))
            lines = [*lines[:2], lines[2] + " ..."] if len(lines) > 3 else lines
            axes.text(x + width / 2, y + (HEIGHT - 0.3) / 2, "\n".join(lines), ha="center", va="center", size=7.6)
    axes.annotate(
        "", xy=(WIDTH + 0.3, -(len(rows) - 1) * (HEIGHT + GAP)), xytext=(WIDTH + 0.3, HEIGHT),
        arrowprops={"arrowstyle": "->", "color": "#8a8f98"},
    )  # fmt: skip
    axes.text(WIDTH + 0.42, -len(rows) / 2, "imports point down", rotation=270, va="center", color="#5a5f68", size=9)
    axes.set_xlim(-0.1, WIDTH + 0.7)
    axes.set_ylim(-(len(rows) - 1) * (HEIGHT + GAP) - 0.1, HEIGHT + 0.1)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
