"""Sphinx's settings: pages in Markdown, the API from docstrings, every warning an error (`make docs`)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import notebooks  # noqa: E402

project = "zoft"
author = "zoft developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "zoft"
myst_heading_anchors = 4
autodoc_typehints = "none"
suppress_warnings = ["misc.highlighting_failure"]  # YAML and shell in one block


def as_pages(app: Any, docname: str, source: list[str]) -> None:
    """Links that lead out of docs/ in the repository, as pages of the site."""
    del app, docname
    source[0] = re.sub(r"\]\(\.\./CONTRIBUTING\.md", "](contributing.md", source[0])
    source[0] = re.sub(r"\]\((notebooks/\w+)\.ipynb", r"](\1.md", source[0])


def notebook_pages(app: Any) -> None:
    """The notebooks as pages, with the outputs that they were kept with."""
    del app
    folder = ROOT / "docs" / "notebooks"
    for path in folder.glob("*.ipynb"):
        folder.joinpath(f"{path.stem}.md").write_text(
            notebooks.as_page(notebooks.read(path), path.stem, folder), encoding="utf-8"
        )


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("builder-inited", notebook_pages)
    app.connect("source-read", as_pages)
