"""`zoft ls`: what can be chosen, one line each."""

from __future__ import annotations

import inspect
import textwrap

from zoft.component import GROUPS, components, group_of, parts_in
from zoft.config.catalog import ORDER, first_comment, preset_files
from zoft.errors import UserError, did_you_mean
from zoft.utils.terminal import fitted

ABOUT = {
    "config": "experiments: a whole run by name",
    "model": "which pretrained model",
    "task": "dataset, template, answers and metric",
    "peft": "which adapter is put on the model",
    "trainable": "which weights move",
    "method": "a paper's method: subspace, estimator, weighting and optimizer together",
    "subspace": "which coordinates of the weights move, and what a direction looks like",
    "estimator": "where the objective is queried, and what the losses say of each direction",
    "weighting": "how the slopes along the directions become the coefficients of the estimate",
    "optimizer": "what step is taken from the estimate",
    "engine": "how the losses are computed",
    "objective": "the number that is minimised",
    "budget": "how much training, in queries",
    "tracker": "where else the metrics go",
    "diagnostics": "what is measured of the estimates beside the run",
    "launcher": "how the cells of a sweep (-m) run",
}


def command(arguments: list[str]) -> int:
    """List one group, or all."""
    files = [name for name in arguments if name.endswith(".py")]
    if files:
        print(fitted("\n".join(line for file in files for line in _of_file(file))))
        return 0
    arguments = [name.removesuffix("s") if name.removesuffix("s") in ORDER else name for name in arguments]
    for group in arguments:
        if group not in ORDER:
            raise UserError(f"there is no group called {group!r}.{did_you_mean(group, ORDER)}")
    print(fitted("\n\n".join(listing(group) for group in arguments or ORDER)))
    return 0


def _of_file(file: str) -> list[str]:
    """A line for each part of a file of one's own, as it is chosen."""
    parts = parts_in(file, file)
    if not parts:
        raise UserError(f"{file} defines no part: a dataclass that inherits from one of zoft's (docs/own_part.md)")
    return [f"{group_of(cls)}={file}:{name}  {first_line(cls)}" for name, cls in parts.items()]


def listing(group: str) -> str:
    """A group and its choices, each with the first line of what it says about itself."""
    entries = {name: first_line(cls) for name, cls in (components(group) if group in GROUPS else {}).items()}
    entries.update({name: first_comment(file) for name, file in preset_files(group).items()})
    width = max(map(len, entries), default=0)
    indent = " " * (width + 4)
    lines = []
    for name, what in sorted(entries.items()):
        lines += textwrap.wrap(what, 120, initial_indent=f"  {name:{width}}  ", subsequent_indent=indent)
    return "\n".join([f"{group}: {ABOUT[group]}", *lines])


def first_line(cls: type) -> str:
    """What a component says first of itself, without the marks of reStructuredText."""
    return inspect.cleandoc(cls.__doc__ or "").split("\n")[0].replace("``", "")
