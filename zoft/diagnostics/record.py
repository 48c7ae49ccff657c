"""diagnostics.csv and diagnostics.json: one row a measurement, and the last one's tables; never a step twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from zoft.report.results import read_json
from zoft.report.text import finite
from zoft.utils.files import write_atomically
from zoft.utils.rows import RowFile, csv_line, whole_lines

CSV, JSON = "diagnostics.csv", "diagnostics.json"

COLUMNS = (
    "step",
    "num_queries",  # of the run so far, none of these
    "num_directions",  # q of the step
    "eps",  # of the step; empty where derivatives are exact
    "cosine",  # of the estimate and the true gradient, over all trained weights
    "cosine_by_chance",  # sqrt(q / d)
    "estimate_norm",
    "gradient_norm",
    "norm_ratio",  # estimate_norm / gradient_norm
    "num_probes",  # directions that were asked, the step's own among them
    "probe_mean",
    "probe_std",
    "probe_rms",  # an estimate of the gradient's norm, without a gradient
    "snr",  # |probe_mean| / probe_std
    "gram_effective_rank",
    "gram_offdiagonal",
    "fd_error_at_eps",  # relative, of finite differences at the run's eps
    "best_eps",
    "fd_error_at_best_eps",
    "diagnostics_queries",  # of all measurements so far; no part of num_queries and of the budget
    "diagnostics_seconds",  # of all measurements so far; no part of the run's seconds
)
"""The columns of diagnostics.csv, in order; a cell is empty where nothing was measured."""


class MeasurementFiles:
    """The files of a run's measurements.

    Args:
        folder: the run's output_dir.
        past: steps that the run knows already: rows up to there stay, later ones will be measured again; 0: a new run.
    """

    def __init__(self, folder: Path, past: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.notes = folder, []
        rows = [row for row in read_rows(folder) if int(row["step"]) <= past]
        last = rows[-1] if rows else {}
        self.num_queries = int(_number(last, "diagnostics_queries"))
        self.seconds = _number(last, "diagnostics_seconds")
        lines = [csv_line(COLUMNS), *(csv_line([row[name] for name in COLUMNS]) for row in rows)]
        self._rows = RowFile(folder / CSV, lines)
        tables = read_tables(folder)
        if not isinstance(tables.get("step", 0), int) or tables.get("step", 0) > past:
            (folder / JSON).unlink()
        else:
            notes = tables.get("notes")
            self.notes += notes if isinstance(notes, list) else []

    def add(self, row: dict[str, Any], tables: dict[str, Any], seconds: float) -> None:
        """Write a measurement; it is on disk afterwards.

        Args:
            row: what is known of :data:`COLUMNS`; its ``diagnostics_queries`` are of this measurement.
            tables: for the JSON file, which has those of the last measurement.
            seconds: what it took.
        """
        self.num_queries += row["diagnostics_queries"]
        self.seconds += seconds
        total = {"diagnostics_queries": self.num_queries, "diagnostics_seconds": round(self.seconds, 3)}
        row = row | total
        self._rows.add(csv_line([_cell(row.get(name)) for name in COLUMNS]))
        text = json.dumps(finite(tables | total | {"notes": self.notes}), indent=1, allow_nan=False)
        write_atomically(self.folder / JSON, text + "\n")


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of diagnostics.csv as text; a line that was cut off, and all that is not of these columns, is left out.

    Example:
        >>> read_rows(Path("no/such/run"))
        []
    """
    rows = csv.reader(line.decode(errors="replace") for line in whole_lines(folder / CSV))
    if tuple(next(rows, ())) != COLUMNS:
        return []
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows if len(row) == len(COLUMNS) and row[0].isdecimal()]


def read_tables(folder: Path) -> dict[str, Any]:
    """What diagnostics.json holds; empty where there is none."""
    path = folder / JSON
    return read_json(path) or {}


def _number(row: dict[str, str], name: str) -> float:
    try:
        return float(row.get(name) or 0.0)
    except ValueError:  # a damaged file
        return 0.0


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else value
