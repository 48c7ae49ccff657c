"""The notebooks of docs/notebooks run from top to bottom, with a tiny model in the place of the demo's."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import matplotlib
import pytest

from tests.runs import model_folder

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
assert _spec is not None
assert _spec.loader is not None
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)
matplotlib.use("agg")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    original, replacing = json.loads(path.read_text(encoding="utf-8")), {}
    if path.stem == "own_data":
        model_folder(tmp_path / "tiny", max_position_embeddings=1200)
        lines = [f"you call no {n},{n % 2}" for n in range(240)]
        (tmp_path / "sms.csv").write_text("text,spam\n" + "\n".join(lines) + "\n")
        replacing = {"zoft:sms-spam": "sms.csv", "zoft:smollm2-135m-instruct": "tiny"}
    notebook, log = notebooks.read(path), logging.getLogger("zoft")
    level = log.level
    try:
        notebooks.run(notebook, replacing)
    finally:
        log.setLevel(level)
    for cell, before in zip(notebook["cells"], original["cells"], strict=True):
        if cell["cell_type"] == "code":
            shown = [[output["output_type"] for output in one["outputs"]] for one in (cell, before)]
            assert shown[0] == shown[1], "".join(cell["source"])
    texts = "".join("".join(output.get("text", ())) for cell in notebook["cells"] for output in cell.get("outputs", ()))
    assert ("method=zoft" if path.stem == "own_data" else "after 60 queries") in texts


def test_a_page_of_a_notebook_has_its_text_code_outputs_and_pictures(tmp_path: Path):
    for path in NOTEBOOKS:
        page = notebooks.as_page(notebooks.read(path), path.stem, tmp_path)
        assert page.startswith("# ")
        assert page.count("```python\n") >= 5
        assert "```text\n" in page
    assert len(list(tmp_path.glob("own_part_*.png"))) == 1
