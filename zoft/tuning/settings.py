"""How a search goes: its budget, its kind, its direction; checked before anything runs, and written to its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.tuning.space import SearchSpace, Values

SEARCHES = ("zo", "random", "tpe")
"""What a search may be: our sampler, and two of Optuna's (Bergstra et al. 2011; Akiba et al. 2019)."""

NAME = "journal.jsonl"
"""Of the record of a search, in its folder."""


@dataclass
class TuneSettings:
    """How a search goes; see :func:`zoft.tune`."""

    budget: int
    repeats: int = 1
    workers: int = 1
    search: str = "zo"
    direction: str = "minimize"
    seed: int = 0
    stop_early: bool = False
    about: dict[str, Any] = field(default_factory=dict)  # what else a record must agree in

    def __post_init__(self) -> None:
        for name in ("budget", "repeats", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.budget < self.repeats:
            raise UserError(
                f"budget={self.budget} evaluations pay for no point of repeats={self.repeats}: raise budget to "
                f"{self.repeats} or more"
            )
        for name, known in (("search", SEARCHES), ("direction", ("minimize", "maximize"))):
            if getattr(self, name) not in known:
                near = did_you_mean(str(getattr(self, name)), known)
                raise UserError(f"there is no {name} called {getattr(self, name)!r}.{near}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"seed must be a whole number >= 0, got {self.seed!r}")

    def header(self, space: SearchSpace, x0: Values | None) -> dict[str, Any]:
        """What a record must agree in; all but the budget, which may grow, and the workers."""
        names = ("repeats", "search", "direction", "seed", "stop_early")
        return {
            "space": space.texts(),
            "start": x0,
            **{name: getattr(self, name) for name in names},
            "batch": self.workers,
            **self.about,
        }


def record_at(folder: str | Path | None) -> Path | None:
    """The record's place in a folder."""
    return None if folder is None else Path(folder) / NAME
