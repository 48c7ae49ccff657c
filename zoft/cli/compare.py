"""`zoft compare`: runs beside each other, a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from zoft.errors import UserError, did_you_mean
from zoft.utils.terminal import width_of
from zoft.utils.words import folder_of, read_words

KEYS, FLAGS = ("output", "axis"), ("--json",)
HELP = """\
usage: zoft compare RUN_OR_SWEEP... [axis=queries|seconds|tokens] [output=DIR] [--json]

Runs beside each other: one row for all that differ in their seed alone, with the mean over the seeds and its 95 %
interval (Student's; of one run, its own), the gain over zero-shot, queries, time and peak memory. A sweep's folder
stands for its cells. Printed, and written to output= (the sweep's folder where one is given, else runs/compare):
compare.csv, compare.md, compare.html, and compare.png, metric and loss on the dev rows against the axis.

Examples:
  zoft compare runs/quickstart-sweep
  zoft compare runs/one runs/two axis=seconds
"""


def command(arguments: list[str]) -> int:
    """Compare."""
    asked, places, flags, _ = read_words("compare", arguments, keys=KEYS, flags=FLAGS)
    places = [folder_of(place) for place in places]
    if not places:
        raise UserError("say which runs: zoft compare RUN_A RUN_B, or a sweep's folder")
    from zoft.cli.train import _quiet
    from zoft.use.compare.picture import AXES, picture
    from zoft.use.compare.runs import grouped, read_runs
    from zoft.use.compare.table import plain, table, write

    axis = asked.get("axis", "queries")
    if axis not in AXES:
        raise UserError(f"axis must be one of {', '.join(AXES)}, got {axis!r}.{did_you_mean(axis, AXES)}")
    _quiet()
    groups = grouped(read_runs(places))
    rows = table(groups)
    alone = len(places) == 1
    folder = Path(asked.get("output") or (places[0] if alone else "runs/compare"))
    folder.mkdir(parents=True, exist_ok=True)
    files = [path.name for path in [*write(rows, folder), picture(groups, folder, axis)] if path is not None]
    print(json.dumps(rows) if "--json" in flags else f"{plain(rows, width_of())}\n\n{folder}: {', '.join(files)}")
    return 0
