"""`zoft estimate`: what a run will take, before any weight is loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from zoft.utils.terminal import fitted
from zoft.utils.words import counted, read_words

if TYPE_CHECKING:
    from zoft.use.plan.estimate import RunEstimate

KEYS: tuple[str, ...] = ()
FLAGS = ("--time", "--json")
HELP = """\
usage: zoft estimate [config=NAME_OR_PATH] [group=choice]... [key=value]... [--time] [--json]

Memory of the run that these arguments describe (those of zoft train), part by part, beside backpropagation through a
LoRA and through all weights with AdamW, on the same model and batch. The data and the tokenizer are read, of the
model its config alone: no weight is loaded. On a CPU everything counts the interpreter and its libraries too, as a
process would show it. The floor of backpropagation counts no temporary buffers.

--time    load the weights, make three steps in a folder of their own, and say how long training will take;
          evaluations come on top
--json    for machines

Examples:
  zoft estimate config=quickstart
  zoft estimate config=classify task.train=reviews.csv model.name=Qwen/Qwen3-0.6B peft=lora --time
"""


def command(arguments: list[str]) -> int:
    """Estimate."""
    from zoft.cli.train import _quiet, _require_a_start

    _, overrides, flags, _ = read_words("estimate", arguments, keys=KEYS, flags=FLAGS, bare=False)
    _require_a_start(overrides)
    from zoft.config import compose
    from zoft.use.plan.estimate import estimate

    _quiet()
    cfg = compose(overrides)
    _require_a_start(overrides, cfg)
    estimated = estimate(cfg, probe="--time" in flags)
    if "--json" in flags:
        totals = {f"{name}_mb": getattr(estimated, name).total_mb for name in ("method", "lora", "adamw")}
        print(json.dumps(dataclasses.asdict(estimated) | totals))
    else:
        print(fitted("\n".join(lines(estimated))))
    return 0


def lines(estimated: RunEstimate) -> list[str]:
    """The estimate for people."""
    from zoft.report.text import duration, gib

    parts = {"interpreter, libraries": estimated.method.host_mb} if estimated.method.host_mb else {}
    parts_text = ", ".join(f"{name} {_size(mb)}" for name, mb in {**estimated.method.parts, **parts}.items())
    rows = [
        f"model     {estimated.model}: {estimated.num_params:,} weights, {estimated.num_trainable:,} trained, "
        f"on {estimated.device}",
        f"this run  {gib(estimated.method.total_mb)}: {parts_text}",
    ]
    if estimated.adamw.parts:
        rows.append(f"LoRA      {gib(estimated.lora.total_mb)} by backpropagation, rank 8 on queries and values")
        rows.append(f"AdamW     {gib(estimated.adamw.total_mb)} by backpropagation of all weights")
    if estimated.free_mb is not None:
        fits = "fits" if estimated.method.total_mb - estimated.method.host_mb <= estimated.free_mb else "DOES NOT FIT"
        rows.append(f"free      {gib(estimated.free_mb)} now: this run {fits}")
    if estimated.seconds is not None:
        queries = counted(estimated.queries, "queries")
        rows.append(f"time      about {duration(estimated.seconds)} for {queries}; evaluations come on top")
    return rows


def _size(mb: float) -> str:
    return f"{mb / 1024:.2f} GiB" if mb >= 1024 else f"{mb:.0f} MiB"
