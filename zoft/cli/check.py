"""`zoft check`: a run looked at before it begins, a tick, a cross or a dash for each thing."""

from __future__ import annotations

import json
import logging

from zoft.utils.terminal import fitted
from zoft.utils.words import read_words

KEYS: tuple[str, ...] = ()
FLAGS = ("--quick", "--json")
HELP = """\
usage: zoft check [config=NAME_OR_PATH] [group=choice]... [key=value]... [--quick] [--json]

Looks at the run that these arguments describe (those of zoft train) and prints a line for each thing: a tick for what
is well, a cross for what would keep the run from beginning or make it mean nothing, a dash for what could be better.
Config, data and columns, rows that stand in train and in dev or test, texts that come back from their tokens, options
that tokenise alike, rows that are cut, the model's config, memory against what is free; all before a weight is loaded.
Then two steps in a folder of their own. Exit code 0 without a cross, 2 with one.

--quick   without the two steps: no weight is loaded
--json    for machines

Example:
  zoft check config=classify task.train=reviews.csv
"""


def command(arguments: list[str]) -> int:
    """Check."""
    from zoft.cli.doctor import Check, line
    from zoft.cli.train import _quiet, _require_a_start

    _, overrides, flags, _ = read_words("check", arguments, keys=KEYS, flags=FLAGS, bare=False)
    _require_a_start(overrides)
    from zoft.config import compose
    from zoft.use.plan.check import checked

    _quiet()
    cfg = compose(overrides)
    _require_a_start(overrides, cfg)
    logging.getLogger("zoft").setLevel(logging.ERROR)  # what is noted is a line of its own here
    findings = []
    for finding in checked(cfg, rehearse="--quick" not in flags):
        findings.append(finding)
        if "--json" not in flags:
            print(fitted(line(Check(finding.name, finding.state, finding.text))), flush=True)
    failed = [finding.name for finding in findings if finding.state == "failed"]
    if "--json" in flags:
        print(json.dumps({"ok": not failed, "checks": [vars(finding) for finding in findings]}, indent=2))
    else:
        ready = "Ready, as far as it shows without the two steps" if "--quick" in flags else "Ready"
        print(f"\nNot ready: {', '.join(failed)}." if failed else f"\n{ready}: zoft train with the same arguments.")
    return 2 if failed else 0
