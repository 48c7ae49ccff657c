"""Runs from their folders, and which of them differ in their seed alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.report.results import REPORT, read_json, read_metrics
from zoft.run.folder import CONFIG, keys_of

log = logging.getLogger(__name__)
_NOT_SETTINGS = ("seed", "output_dir", "config", "defaults", "tracker", "hydra")
_DEPTH = 2  # folders below a sweep's that are looked into


@dataclass
class Run:
    """One run.

    Args:
        folder: its folder.
        seed: its line in the config.
        settings: dotted key -> the same of what else is set.
        facts: of its report; empty where it has not ended.
        rows: of its metrics.
    """

    folder: Path
    seed: str
    settings: dict[str, str]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass
class Group:
    """Runs that differ in their seed alone.

    Args:
        name: what tells them from the other groups.
        runs: at least one.
    """

    name: str
    runs: list[Run] = field(default_factory=list)


def read_runs(places: Sequence[str]) -> list[Run]:
    """The runs of some folders; a sweep's folder stands for its cells.

    Raises:
        UserError: a folder that holds no run.
    """
    by_folder: dict[Path, Run] = {}
    for place in places:
        folder = Path(place)
        if not folder.is_dir():
            raise UserError(f"there is no folder {place}")
        runs = [path for path in _below(folder, _DEPTH) if (path / CONFIG).is_file()]
        if not runs:
            raise UserError(f"{place} holds no run of zoft train, nor does a folder in it")
        by_folder.update({path.resolve(): _read(path) for path in runs})
    return list(by_folder.values())


def _below(folder: Path, depth: int) -> list[Path]:
    if (folder / CONFIG).is_file() or not depth:
        return [folder]
    return [path for one in sorted(folder.iterdir()) if one.is_dir() for path in _below(one, depth - 1)]


def _read(folder: Path) -> Run:
    lines = keys_of((folder / CONFIG).read_text(encoding="utf-8"))
    settings = {key: line.strip() for key, line in lines if key.partition(".")[0] not in _NOT_SETTINGS}
    parts = [line.strip() for key, line in lines if key == "defaults" and "override" in line]
    chosen = dict(part.removeprefix("- override /").split(": ", 1) for part in parts)
    settings |= {group: f"{group}={name}" for group, name in chosen.items()}
    seed = dict(lines).get("seed", "").strip()
    return Run(folder, seed, settings, read_json(folder / REPORT) or {}, read_metrics(folder))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs with the same settings together, each group under what tells it from the others; no seed counts twice."""
    keys = sorted({key for run in runs for key in run.settings})
    differ = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    groups: dict[tuple[str | None, ...], Group] = {}
    for run in runs:
        values = tuple(run.settings.get(key) for key in differ)
        group = groups.setdefault(values, Group(_name(run, differ)))
        same = next((one for one in group.runs if one.seed == run.seed), None)
        if same is not None:
            log.warning("%s and %s are the same run, seed and all, which counts once", same.folder, run.folder)
        if same is None or "final" not in same.facts:
            group.runs = [*(one for one in group.runs if one is not same), run]
    names = [group.name for group in groups.values()]
    for group in groups.values():
        if names.count(group.name) > 1:  # what tells them apart is not in the name
            group.name = group.runs[0].folder.name
    return list(groups.values())


def _name(run: Run, differ: Sequence[str]) -> str:
    """The parts and values of a run that others have otherwise; the folder's name where there are many or none."""
    parts = [key for key in differ if "." not in key and "=" in run.settings.get(key, "")]
    values = [key for key in differ if "." in key and key.partition(".")[0] not in parts]
    parts_of_name = [run.settings[key] for key in parts]
    parts_of_name += [f"{key}={run.settings[key].partition(': ')[2]}" for key in values if key in run.settings]
    other = str(run.facts.get("method") or run.folder.name) if not differ else run.folder.name
    return " ".join(parts_of_name) if 0 < len(parts_of_name) <= 3 else other
