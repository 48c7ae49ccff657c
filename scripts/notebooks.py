"""The notebooks of docs/notebooks: run without Jupyter, their outputs kept, and made into pages of the site.

    python scripts/notebooks.py docs/notebooks/*.ipynb      runs each in an empty folder and writes its outputs into it

What a cell prints, the value of its last line and open figures of matplotlib are its outputs, as in Jupyter.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_DPI = 80


def read(path: Path) -> dict[str, Any]:
    """A notebook (format 4) as it lies there."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source(cell: Mapping[str, Any]) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def run(notebook: dict[str, Any], replacing: Mapping[str, str] | None = None) -> None:
    """Run every code cell in one namespace, in the folder of the moment; outputs are written into the cells.

    Args:
        notebook: of :func:`read`; changed in place.
        replacing: text of code -> other text, for a smaller model, say; each must occur.

    Raises:
        Exception: what a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    left = dict(replacing or {})
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), start=1):
        code = source(cell)
        for text in [text for text in left if text in code]:
            code = code.replace(text, left.pop(text))
        cell["execution_count"], cell["outputs"] = number, list(_outputs(code, names, number))
    if left:
        raise ValueError(f"no cell says {next(iter(left))!r}")


def _outputs(code: str, names: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """What one cell gives."""
    body = ast.parse(code)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(body, f"cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        yield {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
    for picture in _pictures():
        yield {"output_type": "display_data", "metadata": {}, "data": {"image/png": picture}}


def _pictures() -> Iterator[str]:
    pyplot = sys.modules.get("matplotlib.pyplot")
    for number in pyplot.get_fignums() if pyplot else ():
        buffer = io.BytesIO()
        pyplot.figure(number).savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        pyplot.close(number)
        yield base64.b64encode(buffer.getvalue()).decode()


def as_page(notebook: Mapping[str, Any], stem: str, folder: Path) -> str:
    """The notebook in Markdown; its pictures are written beside it.

    Args:
        notebook: of :func:`read`.
        stem: of its name, for the pictures'.
        folder: where they go.
    """
    parts = []
    for place, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(f"```python\n{source(cell)}\n```")
        for output in cell["outputs"]:
            text = output.get("text") or output.get("data", {}).get("text/plain")
            if text:
                parts.append(f"```text\n{''.join(text).rstrip()}\n```")
            if picture := output.get("data", {}).get("image/png"):
                name = f"{stem}_{place}.png"
                (folder / name).write_bytes(base64.b64decode(picture))
                parts.append(f"![what the cell draws]({name})")
    return "\n\n".join(parts) + "\n"


def main(paths: list[str]) -> None:
    """Run notebooks and keep what they give."""
    os.environ.setdefault("MPLBACKEND", "agg")
    for path in map(Path, paths):
        notebook, place, before = read(path), path.resolve(), Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                run(notebook)
            finally:
                os.chdir(before)
        place.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
