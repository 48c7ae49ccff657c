"""Experiment trackers: queries as the x-axis of every curve, and one tracker run a training run."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

QUERIES = "train/num_queries"
"""What `num_queries` is called once transformers' WandbCallback has rewritten a log row (evaluation rows too)."""


class TrackerAxisCallback(TrainerCallback):
    """Makes Weights & Biases draw every curve against queries, when `report_to` names wandb.

    transformers' own callback makes the step the axis and writes into `./wandb`; this one, added after it, says
    otherwise on both counts: the axis is the number of queries and the files go into `output_dir`, unless the user
    chose a place with WANDB_DIR.

    Example:
        >>> QUERIES
        'train/num_queries'
    """

    def __init__(self) -> None:
        self._run_id: str | None = None  # of the wandb run whose axis is already set

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Send the trackers' files into the run's own folder, before anything starts one of their runs."""
        keep_in_folder(args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Define the axis; at a log row too, of a run that began otherwise: with an evaluation, or anew in a search."""
        if not state.is_world_process_zero or not _wanted(args):
            return
        run = _current_run()
        if run is None or run.id == self._run_id:
            return
        run.define_metric(QUERIES)
        run.define_metric("*", step_metric=QUERIES, step_sync=True)
        self._run_id = run.id

    on_log = on_train_begin


def keep_in_folder(args: TrainingArguments) -> None:
    """Have trackers write into the run's folder, unless the user chose a place by their own variables.

    Args:
        args: of the run, before its trainer is made.
    """
    folder = os.path.abspath(str(args.output_dir))
    for tracker, (variable, place) in _PLACES.items():
        if _wanted(args, tracker):
            os.makedirs(folder, exist_ok=True)  # wandb falls back to a temporary folder when it is not there
            set_variable(variable, place.format(folder))


def set_variable(variable: str, value: str, overrides: bool = False) -> None:
    """Set a variable for trackers; one that the user has set stays, unless a setting overrides it."""
    ours = _Variables.ours.get(variable)
    if overrides or os.environ.get(variable, ours) == ours:
        os.environ[variable] = _Variables.ours[variable] = value


def forgive_trackers(callbacks: Iterable[TrainerCallback]) -> None:
    """A tracker that fails is left out from then on, and said once: the run itself needs none.

    Args:
        callbacks: a trainer's; those of transformers' integrations are changed in place.
    """
    for callback in callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            _forgive(callback)


def _forgive(callback: TrainerCallback) -> None:
    failed = False

    def forgiving(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return call(*args, **kwargs)
            except Exception as error:
                failed = True
                name, first = type(callback).__name__.removesuffix("Callback"), str(error).splitlines() or ["it failed"]
                log.warning("the tracker %s is left out from here on: %s", name, first[0])
                return None

        return called

    for event in [name for name in dir(callback) if name.startswith("on_")]:
        setattr(callback, event, forgiving(getattr(callback, event)))


_PLACES = {
    "wandb": ("WANDB_DIR", "{}"),
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", "{}/tensorboard"),
    "trackio": ("TRACKIO_DIR", "{}/trackio"),
    "mlflow": ("MLFLOW_TRACKING_URI", "file:{}/mlruns"),
}
"""Tracker -> (the variable that says where it writes, its value for a run's folder)."""


class _Variables:
    ours: ClassVar[dict[str, str]] = {}  # variable -> what this file has set it to; any other value is the user's


def close_trackers() -> None:
    """Finish the wandb run of this process, if there is one: the next run in it would be written into the same.

    Does not import wandb, and does nothing where it has not been imported already.

    Example:
        >>> close_trackers()
    """
    run = _current_run()
    if run is not None:
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()
    for variable, value in _Variables.ours.items():
        if os.environ.get(variable) == value:
            del os.environ[variable]
    _Variables.ours.clear()


def _wanted(args: TrainingArguments, tracker: str = "wandb") -> bool:
    report_to = args.report_to or []
    names = [report_to] if isinstance(report_to, str) else report_to
    return tracker in names or "all" in names


def _current_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
