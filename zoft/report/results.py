"""What was measured: metrics.jsonl, and held-out rows with the hashes of weights and rows that the figures are of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from zoft.utils.files import write_atomically
from zoft.utils.rows import whole_lines

ZERO_SHOT, FINAL, REPORT, METRICS = "zero_shot.json", "final.json", "report.json", "metrics.jsonl"
WEIGHTS = "weights_sha256"
_LARGEST = 1 << 24  # bytes of a file that is looked into


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no such file, or it is damaged."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_results(path: Path, of: dict[str, str | None]) -> dict[str, float] | None:
    """The numbers of a file that :func:`write_results` wrote for the same weights and rows; None where it did not.

    Args:
        path: the file.
        of: hashes: ``weights_sha256``, and what else the numbers depend on.
    """
    results = read_json(path) or {}
    if any(results.pop(name, None) != sha for name, sha in of.items()):
        return None
    whole = bool(results) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in results.values())
    return {name: float(value) for name, value in results.items()} if whole else None


def write_results(path: Path, values: dict[str, float], of: dict[str, str | None]) -> None:
    """Keep numbers with the hashes of what they are of."""
    write_atomically(path, json.dumps({**values, **of}, indent=2) + "\n")


def finished(folder: Path) -> dict[str, Any] | None:
    """The report of a run that has ended: its facts, where they and the final results are of the same weights."""
    report, final = read_json(folder / REPORT), read_json(folder / FINAL)
    if report is None or final is None or not isinstance(report.get(WEIGHTS), str):
        return None
    return report if final.get(WEIGHTS) == report[WEIGHTS] else None


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in step order as written.

    Returns:
        One dict a log step; a quantity not measured at that step is absent, one that was not finite is NaN.
        Empty when there is no such file. A half-written last line is left out.

    Example:
        >>> read_metrics("no/such/run")
        []
    """
    rows = []
    for line in whole_lines(Path(folder) / METRICS):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a power cut can leave a torn block in the middle; the other rows are still good
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows
