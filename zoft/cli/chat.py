"""`zoft chat`: talk with a run's model, the one before training beside it with --compare."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from zoft.cli.generate import loaded_of, writing_of
from zoft.errors import UserError
from zoft.utils.terminal import columns, fitted
from zoft.utils.words import read_words

KEYS, FLAGS = ("run", "model", "system", "max_new_tokens", "temperature", "seed"), ("--compare",)
HELP = """\
usage: zoft chat run=DIR [--compare] [system=TEXT] [max_new_tokens=128] [temperature=0] [seed=0]
       zoft chat model=NAME

A conversation in the model's own chat template, line by line from the terminal or a pipe. With --compare the
model as it was before training answers beside the tuned one, each in a conversation of its own; an adapter's
base takes no memory of its own. /reset begins anew, /quit or Ctrl-D ends.
"""


def command(arguments: list[str]) -> int:
    """Talk."""
    asked, overrides, flags, _ = read_words("chat", arguments, keys=KEYS, flags=FLAGS, bare=False)
    compare = "--compare" in flags
    if compare and asked.get("model"):
        raise UserError("--compare shows a run's model beside the one before training: give run=DIR, not model=")
    how = writing_of(asked)
    from zoft.use.inference.chat import Talk
    from zoft.use.inference.generate import require_template

    loaded = loaded_of("chat", asked, overrides, with_base=compare)
    require_template(loaded)
    talk = Talk(loaded, how, compare, asked.get("system", ""), columns(sys.stdout))
    if sys.stdin.isatty():
        print(fitted(f"talking with {loaded.name}; /reset begins anew, /quit or Ctrl-D ends"))
    talk.run(_lines(), lambda text: print(text, flush=True))
    return 0


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError:
            raise UserError("a line is not UTF-8 text: re-encode it") from None
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
