"""`zoft predict`: labels with probabilities for new rows, by a run's final model."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten

from zoft.errors import UserError
from zoft.utils.terminal import fitted, width_of
from zoft.utils.words import counted, read_words

KEYS, FLAGS = ("run", "data", "output"), ("--json",)
HELP = """\
usage: zoft predict run=DIR data=FILE [output=FILE.csv|FILE.jsonl] [key=value]... [--json]

Labels for rows that have none, by a finished run's model. FILE is a csv, tsv, json, jsonl or parquet file, or
a hub data set, with the columns that the run's prompts are made of; a label column is not needed, and not
read. Each row is written with `prediction`, `probability` (softmax of the scores that training compares) and
the probability of every label. A run on completions or rewards writes the model's text instead.
Other keys are the run's own and change it: model.dtype=bfloat16, trainer.per_device_eval_batch_size=64.

output=FILE    default DIR/predictions-NAME.csv or .jsonl, as the data; -NAME.tsv.jsonl of other kinds
--json         print the rows too

Example:
  zoft predict run=runs/quickstart-seed0 data=messages.csv
"""

_SHOWN = 5


def command(arguments: list[str]) -> int:
    """Predict."""
    asked, overrides, flags, _ = read_words("predict", arguments, keys=KEYS, flags=FLAGS, bare=False)
    for key, what in (("run", "the folder of a finished run"), ("data", "a file with the rows to predict")):
        if not asked.get(key):
            raise UserError(f"{key}= is missing: give {what}, zoft predict run=runs/mine data=new.csv")
    from zoft.cli.train import _quiet
    from zoft.use.inference.predict import predict

    _quiet()
    data = Path(asked["data"].removeprefix("zoft:"))
    kind = data.suffix if data.suffix in (".csv", ".jsonl") else ".jsonl"
    name = data.stem if data.suffix == kind else data.name  # u.tsv beside u.jsonl: two files
    output = asked.get("output") or str(Path(asked["run"]) / f"predictions-{name}{kind}")
    done = predict(asked["run"], asked["data"], output, overrides)
    if "--json" in flags:
        for row in done.rows:
            print(json.dumps(row, ensure_ascii=False, default=str))
        return 0
    for row in done.rows[:_SHOWN]:
        sure = f"  {100 * row['probability']:5.1f} %" if "probability" in row else ""
        text = next((str(v) for k, v in row.items() if k not in done.columns and isinstance(v, str)), "")
        line = f"{str(row['prediction'])[:40]!r:<16}{sure}  "
        print(line + shorten(text, max(20, (width_of() or 120) - len(line)), placeholder=" ..."))
    rest, said = len(done.rows) - _SHOWN, f"{counted(len(done.rows), 'rows')} with {', '.join(done.columns)}: {output}"
    print(fitted(f"{f'... and {rest:,} more; ' * (rest > 0)}{said}"))
    return 0
