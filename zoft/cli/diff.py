"""`zoft diff`: where two runs' journals part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoft.cli.journal import as_row, journal_of
from zoft.errors import UserError
from zoft.run.folder import CONFIG
from zoft.utils.terminal import fitted
from zoft.utils.words import folder_of

SAME, DIFFERENT = 0, 1
_NAMES = ("config", "defaults", "output_dir")


def command(arguments: list[str]) -> int:
    """Compare two journals.

    Returns:
        0 if they say the same, 1 if not.
    """
    arguments = [folder_of(word) for word in arguments]
    if len(arguments) != 2 or any(word.startswith("-") for word in arguments):
        raise UserError("say which two runs: zoft diff RUN_A RUN_B")
    from zoft.journal import file as journal

    a, b = (journal.read(journal_of(run)) for run in arguments)
    settings = _differing(a.header.get("settings", {}), b.header.get("settings", {}))
    for key in ("model", "weights", "frozen"):
        if a.header.get(key) != b.header.get(key):
            settings.append(f"  {key}: {str(a.header.get(key))[:40]} | {str(b.header.get(key))[:40]}")
    config_a, config_b = (_config_of(run) for run in arguments)
    same = "the same, as far as a journal has them (no learning rate, budget or model's name)"
    if config_a is not None and config_b is not None:
        same = "the same"
        named = {line.split(":")[0].strip() for line in settings}
        settings += [line for line in _differing(config_a, config_b) if line.split(":")[0].strip() not in named]
    print(fitted("settings: " + (same if not settings else "they differ in\n" + "\n".join(settings))))
    steps = {record.step: record for record in b.records}
    for record in a.records:
        other = steps.get(record.step)
        if other is None:
            break
        lines = _differing(_compared(as_row(record)), _compared(as_row(other)))
        if lines:
            print(fitted(f"steps: the same before step {record.step}, where they differ in\n" + "\n".join(lines)))
            return DIFFERENT
    shared = sum(record.step in steps for record in a.records)
    if a.end != b.end:
        print(f"steps: the {shared:,} that both have are the same; one has {a.end:,} steps, the other {b.end:,}")
        return DIFFERENT
    print(f"steps: all {shared:,} are the same")
    return DIFFERENT if settings else SAME


def _config_of(run: str) -> dict[str, Any] | None:
    """The values of a run's config by their full names, but for those that name the run; None for a journal alone."""
    file = Path(run) / CONFIG
    if not file.is_file():
        return None
    from zoft.config.experiments import read

    values: Any = read(file, str(file))
    return {key: value for key, value in _flat(dict(values)).items() if key.split(".")[0] not in _NAMES}


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {name: values}
    return {key: value for part in values for key, value in _flat(values[part], f"{name}.{part}".lstrip(".")).items()}


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    """Without what sealing leaves out: a sealed journal is the same as it was before."""
    return {key: value for key, value in row.items() if key not in ("loss", "slope", "tokens", "scalars")}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [f"  {key}: {a.get(key)} | {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
