"""`zoft tune`: a training job's settings by search; prints the best points and the command that trains the best."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from zoft.cli import requeue_on_signals
from zoft.errors import UserError
from zoft.utils.terminal import fitted
from zoft.utils.words import read_words, refuse_near_miss

if TYPE_CHECKING:
    from zoft.tuning.evaluation import Evaluation, TuneResult
    from zoft.tuning.jobs import Tuned

_OWN = ("repeats", "workers", "metric", "direction", "search", "stop_early", "output_dir")
_SPACE = "space."


def command(arguments: list[str]) -> int:
    """Tune.

    Returns:
        The exit code: 1 where no point could be trained to its end.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in zoft train
    space, asked, training = split(arguments)
    from zoft.cli.train import _quiet
    from zoft.tuning.settings import TuneSettings
    from zoft.tuning.space import SearchSpace

    _quiet()
    metric = asked.get("metric", "eval_loss")
    settings = TuneSettings(
        budget=_whole("budget", asked.get("budget", "40")),
        repeats=_whole("repeats", asked.get("repeats", "1")),
        workers=_whole("workers", asked.get("workers", "1")),
        search=asked.get("search", "zo"),
        direction=asked.get("direction") or direction_of(metric),
        stop_early=_flag(asked.get("stop_early", "true")),
    )
    if SearchSpace(space).is_mostly_choices and settings.search == "zo":
        note = (
            "note: most of this space is choices, which have no slope that a zeroth-order search could follow: "
            "search=tpe (Optuna's) is the better tool for it (docs/tune.md)"
        )
        print(fitted(note))
    for line in _of_a_job(training):
        print(fitted(line))
    from zoft.tuning.jobs import tune_training  # what is wrong with arguments and data has been said by now

    requeue_on_signals()
    show = Progress(settings.budget, settings.repeats, metric)
    tuned = tune_training(training, space, settings, metric=metric, output_dir=asked.get("output_dir"), callback=show)
    print(fitted(summary(tuned, metric)))
    return 0 if tuned.result.best else 1


def _of_a_job(training: list[str]) -> list[str]:
    """What one job takes, before the first one begins; nothing where its config or its model cannot be read."""
    from zoft.config import compose
    from zoft.lm.models.files import placed
    from zoft.run.build import load_rows
    from zoft.use.plan.estimate import of_run

    try:
        cfg = compose(training)
    except UserError:  # of a parameter that the search gives, or else the first job says it
        return []
    splits = cfg.task.load()
    placed(cfg.model.name)
    try:
        return of_run(cfg, load_rows(cfg, splits)[1])
    except (UserError, OSError):  # the first job says it
        return []


def split(arguments: list[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(space, settings of the search, arguments of `zoft train`).

    Args:
        arguments: as written.

    Raises:
        UserError: a flag, a parameter twice, or no parameter at all.

    Example:
        >>> split(["config=smoke", "space.estimator.eps=log(1e-4,1e-2)", "budget=8"])
        ({'estimator.eps': 'log(1e-4,1e-2)'}, {'budget': '8'}, ['config=smoke'])
    """
    from zoft.config.catalog import ORDER
    from zoft.config.schema import ZoftConfig

    ranges = [name for argument in arguments if (name := argument.partition("=")[0]).startswith(_SPACE)]
    # budget=8 is the search's, budget=mezo a choice of the config
    budgets = {argument for argument in arguments if argument.startswith("budget=") and argument[7:8].isalpha()}
    others = [argument for argument in arguments if argument not in budgets]
    words = read_words("tune", others, keys=["budget", *_OWN, *ranges])
    training = [argument for argument in arguments if argument in budgets or argument in words.rest]
    for word in training:
        refuse_near_miss("tune", word, ("budget", *_OWN), {*ORDER, *ZoftConfig.__dataclass_fields__})
    space = {name.removeprefix(_SPACE): text for name, text in words.own.items() if name.startswith(_SPACE)}
    if not space:
        raise UserError("there is nothing to tune: add ranges, e.g. space.optimizer.learning_rate='log(1e-5,1e-1)'")
    return space, {name: text for name, text in words.own.items() if not name.startswith(_SPACE)}, training


def direction_of(metric: str) -> str:
    """Where more of a metric is better: accuracy, F1, exact match and reward; else less.

    Example:
        >>> direction_of("eval_accuracy"), direction_of("eval_loss")
        ('maximize', 'minimize')
    """
    return "maximize" if any(word in metric for word in ("accuracy", "f1", "exact_match", "reward")) else "minimize"


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} must be a whole number >= 1, got {text!r}") from None


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise UserError(f"stop_early must be true or false, got {text!r}")
    return text.lower() == "true"


class Progress:
    """A line for each evaluation."""

    def __init__(self, budget: int, repeats: int, metric: str) -> None:
        self.points, self.metric = budget // repeats, metric
        self.said_resumed = False

    def __call__(self, evaluation: Evaluation, result: TuneResult) -> None:
        """Print it."""
        from zoft.tuning.evaluation import value_text
        from zoft.tuning.space import as_arguments

        if result.num_resumed and not self.said_resumed:
            print(f"resume  {result.num_resumed} points are in the journal")
            self.said_resumed = True
        place = f"{len(result.evaluations)}/{self.points}"
        what = f"failed: {evaluation.error}" if evaluation.error else f"{self.metric} {value_text(evaluation)}"
        mark = ", stopped at half" if evaluation.status == "stopped" else ""
        mark = ", the best so far" if evaluation is result.best else mark
        print(f"{place:>7}  {what}{mark}  ({evaluation.seconds:.1f} s)  {as_arguments(evaluation.values)}", flush=True)


def summary(tuned: Tuned, metric: str) -> str:
    """What is printed at the end."""
    from zoft.tuning.space import as_arguments

    result = tuned.result
    lines = ["", result.table(metric=metric), ""]
    counts = f"{len(result.ranked)} points went to their end, {len(result.stopped)} were stopped at half"
    lines.append(f"{result.message} {counts}, {len(result.failed)} failed.")
    lines += [f"  failed: {as_arguments(e.values)}: {e.error}" for e in result.failed[:5]]
    lines.append(f"results  {tuned.folder}: results.json, tune.png, journal.jsonl")
    if result.best:
        lines += [f"the best is in {tuned.best_folder}; to train it again:", f"  {tuned.command}"]
    return "\n".join(lines)
