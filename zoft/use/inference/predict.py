"""Labels with probabilities for new rows, or the text that a run's model writes behind each."""

from __future__ import annotations

import csv
import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError
from zoft.utils.files import write_atomically

SUFFIXES = (".csv", ".jsonl")
WRITTEN = ("generate", "rated")


@dataclass(frozen=True)
class Predicted:
    """The rows with their predictions.

    Args:
        rows: the rows as they were, each with what was predicted.
        columns: the names of what was added.
        output: the file that holds them.
    """

    rows: list[dict[str, Any]]
    columns: tuple[str, ...]
    output: str


def predict(run: str, data: str, output: str, overrides: list[str]) -> Predicted:
    """Predict for every row of a file and write the rows with their predictions.

    Args:
        run: a finished run's folder.
        data: a file, or hub data set, with the columns that the run's prompts are made of; a label is not needed.
        output: a .csv or .jsonl file.
        overrides: arguments that change the run's config.

    Raises:
        UserError: a row that lacks a column, a run whose model neither chooses nor writes, or a file that is there.
    """
    from zoft.lm.data.files import read_placed
    from zoft.use.inference.load import config_of

    cfg = config_of(run, overrides)
    check_output(output, data)
    examples_of, labels = cfg.task.for_new_rows()
    placed = list(read_placed(data, "test"))
    # Before the weights are read: an error in a row should not cost minutes of loading.
    examples = [examples_of(row, where) for where, row in placed]
    predictions = _found(cfg, run, examples, labels)
    rows = [row | more for (_, row), more in zip(placed, predictions, strict=True)]
    added = {name for more in predictions for name in (_flat(more) if output.endswith(".csv") else more)}
    taken = sorted(added & {name for _, row in placed for name in row})
    if taken:
        raise UserError(f"{data} has a column called {taken[0]!r}, as the prediction would be: rename it")
    write_rows(output, rows)
    return Predicted(rows, tuple(predictions[0]), output)


def _found(cfg: ZoftConfig, run: str, examples: list[Any], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """What is added to each row."""
    from zoft.evaluation import evaluate as evaluating
    from zoft.lm import formats
    from zoft.lm.data.lengths import UNCUT
    from zoft.lm.models.load import quiet
    from zoft.run.build import row_limit, say_cut, tokenizer_of

    quiet()
    objective = formats.scorer_of(cfg.task, examples, cfg.objective)
    form = formats.nearest_format(cfg.task, examples, objective)
    if form == "counted":  # a completion that nobody knows: it is written
        form = "generate"
    tokenizer, room = tokenizer_of(cfg, run), formats.room_of(cfg.task, objective)
    encode = functools.partial(formats.encode_rows, form, examples, tokenizer, room=room)
    rows = encode(limit := row_limit(cfg, tokenizer))
    say_cut(rows, limit, "new", functools.partial(encode, UNCUT))
    scoring = evaluating.scoring_of(cfg, run, form, rows, tokenizer, objective)
    if form in WRITTEN:
        return [{"prediction": text.strip()} for text in scoring.texts(rows)[0][0]]
    return [_label(choice.scores, labels or examples[n].options) for n, choice in enumerate(scoring.choices(rows))]


def _label(scores: list[float], labels: tuple[str, ...]) -> dict[str, Any]:
    """The likeliest label, its probability and those of all: softmax of the scores that training compares."""
    from zoft.utils.lazy import torch

    shares = torch.tensor(scores, dtype=torch.float64)[: len(labels)].softmax(0).tolist()
    named = {label.strip(): round(share, 6) for label, share in zip(labels, shares, strict=True)}
    best = max(named, key=lambda label: named[label])
    return {"prediction": best, "probability": named[best], "probabilities": named}


def check_output(output: str, data: str) -> None:
    """Refuse a file of rows of another kind, without a folder, or the one that is read."""
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise UserError(f"output={output} must end in {' or '.join(SUFFIXES)}")
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise UserError(f"output={output} is the file that is read: name another")
    if not path.absolute().parent.is_dir():
        raise UserError(f"output={output}: there is no folder {path.parent}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """With each probability in a column of its own, called ``p(LABEL)``."""
    return row | {f"p({label})": share for label, share in row.get("probabilities", {}).items()}


def write_rows(output: str, rows: list[dict[str, Any]]) -> None:
    """A csv's probabilities are a column each; a jsonl's one object."""
    if output.endswith(".jsonl"):
        write_atomically(Path(output), "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
        return
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row if key != "probabilities"))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_atomically(Path(output), text.getvalue())
