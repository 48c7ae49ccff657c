"""Put a bench's table and pictures into docs/bench.md: the last step of `make bench-demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from zoft.bench.pictures import BUDGETS, RATES
from zoft.bench.table import TABLE

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- table: written by scripts/write_bench.py -->", "<!-- end of table -->"


def main(folder: Path) -> None:
    """Copy what the bench has drawn, and replace what stands between the marks."""
    page = DOCS / "bench.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN, 1)
    table = (folder / TABLE).read_text(encoding="utf-8")
    page.write_text(before + BEGIN + "\n" + table + END + rest.split(END, 1)[1], encoding="utf-8")
    for name in (BUDGETS, RATES):
        shutil.copyfile(folder / name, DOCS / f"bench_{name}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench-demo"))
