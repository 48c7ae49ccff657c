"""Invented rows of every task (tests/assets/tasks), and the local files a task reads them from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SAME = {"arc_challenge": "arc_easy", "masked_sst2": "sst2"}


@cache
def rows(name: str) -> list[dict[str, Any]]:
    """All rows of a task's file."""
    path = Path(__file__).parent / "assets" / "tasks" / f"{SAME.get(name, name)}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(name: str, folder: Path) -> dict[str, str]:
    """Four rows to train on, the others held out: ``train`` and ``validation`` of a task."""
    return files_of(folder, rows(name)[:4], rows(name)[4:])


def files_of(folder: Path, train: list[dict[str, Any]], held: list[dict[str, Any]]) -> dict[str, str]:
    """The same of any rows."""
    for split, part in (("train", train), ("validation", held)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
