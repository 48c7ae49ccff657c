"""The search over a training job's settings: checked against the schema before anything runs, kept in one folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.run.build import METRICS
from zoft.tuning.evaluation import Evaluation, TuneResult
from zoft.tuning.job import Training, overrides
from zoft.tuning.settings import TuneSettings, record_at
from zoft.tuning.space import Choice, Range, SearchSpace, Values, text_of, written
from zoft.tuning.workers import Workers
from zoft.utils.files import at_home, write_atomically
from zoft.utils.own_files import digest

RESULTS = "results.json"
_OF_STEPS = ("loss", "projected_grad", "seconds", "seconds_forward", "peak_memory_mb")


@dataclass
class Tuned:
    """What a search over training jobs leaves.

    Args:
        result: every evaluation.
        folder: of the search.
        best_folder: of the best point's (first) run; empty where there is none.
        command: that trains the best point again; empty where there is none.
    """

    result: TuneResult
    folder: str
    best_folder: str
    command: str


def tune_training(
    arguments: list[str],
    space: dict[str, Any],
    settings: TuneSettings,
    *,
    metric: str = "eval_loss",
    output_dir: str | None = None,
    callback: Callable[[Evaluation, TuneResult], Any] | None = None,
    isolated: bool = True,
) -> Tuned:
    """Search for the settings at which a training job's metric is best.

    Args:
        arguments: of ``zoft train``, for all jobs; one that is in the space too says where the search begins.
        space: key of the config -> range.
        settings: of the search.
        metric: a number that the job logs.
        output_dir: the search's folder; None names one.
        callback: called with each new evaluation and the result so far.
        isolated: run jobs in another process even where there is one worker.

    Returns:
        What was found, where it is, and the command that trains the best of it again.

    Raises:
        UserError: arguments, a space or a metric that cannot work; before anything has been written.
    """
    if metric not in metrics():
        raise UserError(f"there is no metric called {metric!r}.{did_you_mean(metric, metrics())}")
    where = SearchSpace(space)
    start, config, seed, data = check_space(arguments, where)
    folder = output_dir or f"runs/{config}-tune-seed{seed}"
    settings.seed, settings.about = seed, {"arguments": arguments, "metric": metric, "data": data}
    path = str(record_at(folder))
    others = [argument for argument in arguments if argument.partition("=")[0] not in space]
    work = Training(others, folder, metric, seed, settings.repeats, path if settings.stop_early else None)
    refuse_other_things(Path(folder))
    from zoft.tuning.record import StudyRecord
    from zoft.tuning.search import Search

    record = StudyRecord(record_at(folder), settings.header(where, start), where)

    def keep(evaluation: Evaluation, result: TuneResult) -> Any:
        for other in result.evaluations:
            if result.best is None or other.number != result.best.number:
                work.drop_weights(other.number)
        return callback(evaluation, result) if callback is not None else None

    with closing(record), Workers(work, settings.workers, isolated=isolated) as pool:
        search = Search(where, settings, pool, record, start)
        result = search.run(keep)
    best = result.x
    command = shlex.join(["zoft", "train", *work.arguments_of(best, 0, f"{folder}-best")]) if best else ""
    _write(Path(folder), result, metric, command)
    return Tuned(result, folder, work.folder(result.best.number, 0) if result.best else "", command)


def check_space(arguments: list[str], space: SearchSpace) -> tuple[Values, str, int, list[str]]:
    """Compose the job at the ends of every range and with every choice, so that a mistake is found now.

    Returns:
        Where to begin (the config's own values, where they lie in the space), the config's name, the seed, and what
        its files hold, as digests.

    Raises:
        UserError: what ``zoft train`` would say, and of which parameter.
    """
    from zoft.config import compose
    from zoft.config.resolved import data_lines

    for name in space.parameters:
        if name in ("seed", "output_dir", "config"):
            raise UserError(f"space.{name}: {name} is no hyper-parameter: repeats=N averages over seeds")
    base = compose(arguments)
    start = {}
    for name, parameter in space.parameters.items():
        value = _value_at(base, name)
        if parameter.units(value) is not None:
            start[name] = _option(parameter, value)
    middle = space.values(space.units(start))
    for name, parameter in space.parameters.items():
        for value in parameter.ends:
            try:
                compose([*arguments, *overrides({**middle, name: value})])
            except UserError as error:
                raise UserError(
                    f"space.{name}={text_of(space.distributions[name])} at {written(value)}: {error}"
                ) from error
    named = {word: at_home(word[len("config=") :]) for word in arguments if word.startswith("config=")}
    digests = [f"{word} has the SHA-256 {digest(str(path))}" for word, path in named.items() if path.is_file()]
    return start, base.config, base.seed, [*data_lines(base), *digests]


def refuse_other_things(folder: Path) -> None:
    """A search's folder is empty, absent, or holds its record."""
    path = record_at(folder)
    if folder.is_file():
        raise UserError(f"output_dir={folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and path is not None and not path.exists():
        raise UserError(f"output_dir={folder} is not empty and holds no search: choose another folder")


def _option(parameter: Range | Choice, value: Any) -> Any:
    """A choice's own option that is written like the value; another parameter's value as it is."""
    options = parameter.options if isinstance(parameter, Choice) else ()
    return next((option for option in options if written(option) == written(value)), value)


def _value_at(cfg: Any, name: str) -> Any:
    """A config's value at a dotted key; the name of a component; None where there is none."""
    for part in name.split("."):
        cfg = cfg.get(part) if isinstance(cfg, dict) else getattr(cfg, part, None)
    return cfg.name() if callable(getattr(cfg, "name", None)) else cfg


def metrics() -> list[str]:
    """What a training job may log, and a search can be of."""
    return [*dict.fromkeys(f"eval_{name}" for names in METRICS.values() for name in names), *_OF_STEPS]


def _write(folder: Path, result: TuneResult, metric: str, command: str) -> None:
    """results.json and the picture."""
    from zoft.tuning.picture import PLOT, draw_tuning

    data = {"metric": metric, "command": command, **result.as_dict()}
    write_atomically(folder / RESULTS, json.dumps(data, indent=1) + "\n")
    draw_tuning(folder / PLOT, data, metric, folder.name)
