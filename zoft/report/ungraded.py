"""ungraded.jsonl: the texts of a run whose judge gave no number, each with its step and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zoft.lm.objectives._grading import take_ungraded
from zoft.utils.rows import append, json_line, whole_lines

NAME = "ungraded.jsonl"


class UngradedCallback(TrainerCallback):
    """Writes them down after every step and evaluation; a step that is asked again after a kill is written again."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What this process has left of a run before (a cell that broke off) is not this one's."""
        take_ungraded()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write down what the judge left ungraded in the step's queries, or in an evaluation."""
        write(Path(str(args.output_dir)), step=state.global_step)

    on_evaluate = on_step_end


def write(folder: Path, **of: Any) -> int:
    """Add those that this process has had since the last call; how many there were.

    Args:
        folder: whose ``ungraded.jsonl`` grows; nothing is written where there is nothing to write.
        **of: what stands in front of each.
    """
    ungraded = take_ungraded()
    if ungraded:
        folder.mkdir(parents=True, exist_ok=True)
        rows = [json_line({**of, "prompt": one.prompt, "text": one.text, "why": one.why}) for one in ungraded]
        append(folder / NAME, rows)
    return len(ungraded)


def count(folder: Path) -> int:
    """How many a folder's file has."""
    return len(whole_lines(folder / NAME))
