"""`zoft plot`: a run's learning curve drawn again, also while it runs."""

from __future__ import annotations

from pathlib import Path

from zoft.errors import UserError
from zoft.utils.words import folder_of

KEYS: tuple[str, ...] = ()
HELP = """\
usage: zoft plot RUN

Draws a run's curve.png again from its metrics.jsonl, also while the run goes on: loss and metric against queries, the
metric before training as a line, the test score at the end where it is known. zoft compare draws several runs.
"""


def command(arguments: list[str]) -> int:
    """Draw."""
    arguments = [folder_of(word) for word in arguments]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError("say which run: zoft plot RUN")
    from zoft.report.plots import learning_curve
    from zoft.report.results import ZERO_SHOT, read_json
    from zoft.use.compare.runs import read_runs

    (run, *more) = read_runs(arguments)
    if more:
        raise UserError(f"{arguments[0]} holds {len(more) + 1} runs: zoft compare {arguments[0]} draws them together")
    before = read_json(run.folder / ZERO_SHOT) or {}
    metric = str(
        run.facts.get("metric") or next((m for m in ("accuracy", "f1", "reward", "loss") if m in before), "accuracy")
    )
    shown = "perplexity" if metric == "loss" else metric
    path = learning_curve(
        run.folder,
        title=Path(run.folder).resolve().name,
        zero_shot=before.get(shown),
        metric=shown,
        final=run.facts.get("final_perplexity") if shown == "perplexity" else run.facts.get("final"),
    )
    if path is None:
        raise UserError(f"{run.folder} has logged nothing yet: there is nothing to draw")
    print(path)
    return 0
