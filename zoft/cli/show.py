"""`zoft show`: one choice in full."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

from zoft.cli.ls import listing
from zoft.component import GROUPS, Component, components, describe, find, group_of, parts_in
from zoft.config.catalog import ORDER, choices, preset_files
from zoft.config.training_arguments import explained
from zoft.errors import UserError, did_you_mean
from zoft.utils import own_files
from zoft.utils.terminal import fitted

_SECTIONS = {
    "trainer": "",
    "model": "ModelConfig",
    "budget": "BudgetConfig",
    "precision": "PrecisionConfig",
    "tracker": "TrackerConfig",
    "diagnostics": "DiagnosticsConfig",
}
"""Section of the config -> the class that has its keys."""


def command(arguments: list[str]) -> int:
    """Show one or more choices."""
    if not arguments:
        raise UserError("say what to show, e.g. zoft show estimator/central; zoft ls lists everything")
    print("\n\n".join(shown(argument) for argument in arguments))
    return 0


def shown(text: str) -> str:
    """The description of a choice, or of a key."""
    if text.endswith(".py"):
        raise UserError(f"{text} is a file.{did_you_mean(text.rpartition('=')[2], ())}")
    if own_files.split(text) is None and (known := setting(text)):
        return fitted(known)
    if text in ORDER:
        sections = [section(text)] if text in _SECTIONS else []
        return fitted("\n\n".join([listing(text), *sections]))
    if text in _SECTIONS:
        return fitted(section(text))
    group, name = _find(text.replace("=", "/", 1))
    part = find(group, name) if group in GROUPS else None
    if part is not None:
        return fitted(_component(group, name, part))
    if (file := preset_files(group).get(name)) is None:  # what a package brings, and cannot be loaded
        raise UserError(f"there is no {group} called {name!r}; zoft ls {group} lists them")
    return f"{group}={name}  ({file})\n\n{file.read_text(encoding='utf-8').rstrip()}"


def setting(text: str) -> str:
    """One key of the config, with type, default, meaning and the choices that have it; empty where it is no key.

    Args:
        text: ``group.key``, or a key outside of groups.

    Raises:
        UserError: a group, or section, that has no such key.
    """
    group, dot, name = text.partition(".")
    rows = _rows_of(group) if dot else _rows_of("")
    name = name if dot else text
    owners: dict[tuple[str, str, str, str], list[str]] = {}
    for owner, row in rows:
        if row[0] == name:
            owners.setdefault(row, []).append(owner)
    if rows and group and dot and not owners:
        raise UserError(f"{group} has no key {name!r}.{did_you_mean(name, {row[0] for _, row in rows})}")
    lines = []
    for row, homes in owners.items():
        lines += _settings(group if dot else "", [row])
        lines += [f"    of {group}={', '.join(homes)}"] if any(homes) else []
    return "\n".join(lines)


def _rows_of(group: str) -> list[tuple[str, tuple[str, str, str, str]]]:
    """(choice that has it, key) of a group, a section, or, for the empty string, of what is in neither."""
    from zoft.config import schema

    root: Any = schema.ZoftConfig
    if group in _SECTIONS:
        return [("", row) for row in _section_rows(group)]
    if group in GROUPS:
        return [(name, row) for name, cls in components(group).items() for row in describe(cls)]
    return [] if group else [("", row) for row in describe(root) if row[0] not in {*GROUPS, *_SECTIONS, *ORDER}]


def section(name: str) -> str:
    """Every key of a section of the config, with type, default and meaning."""
    from zoft.config import schema

    rows = _section_rows(name)
    if name == "trainer":
        about = "trainer: fields of transformers.TrainingArguments, by their own names, and zoft's own among them"
    else:
        about = f"{name}: {(getattr(schema, _SECTIONS[name]).__doc__ or '').strip().splitlines()[0]}"
    return "\n".join([about, "", *_settings(name, rows)])


def _section_rows(name: str) -> list[tuple[str, str, str, str]]:
    from zoft.config import compose, schema

    rows = explained() if name == "trainer" else describe(getattr(schema, _SECTIONS[name]))
    # as configs/train.yaml and its presets have it, and not a class
    run = compose([]).trainer if name == "trainer" else vars(getattr(compose([]), name))
    return [(key, kind, repr(run[key]) if key in run else default, about) for key, kind, default, about in rows]


def _settings(group: str, rows: list[tuple[str, str, str, str]]) -> list[str]:
    lines = []
    for field, kind, default, meaning in rows:
        lines.append(f"  {group}{'.' * bool(group)}{field}={default}   ({kind})")
        lines += textwrap.wrap(meaning, 110, initial_indent="      ", subsequent_indent="      ")
    return lines


def _find(text: str) -> tuple[str, str]:
    group, slash, name = text.partition("/")
    if slash and (group in ORDER or own_files.split(text) is None):
        if group not in ORDER:
            raise UserError(f"there is no group called {group!r}.{did_you_mean(group, ORDER)}")
        if name not in choices(group) and own_files.split(name) is None:
            raise UserError(f"there is no {group} called {name!r}.{did_you_mean(name, choices(group))}")
        return group, name
    if (named := own_files.split(text)) is not None:
        part = parts_in(named[0], text).get(named[1])
        return (group_of(part) if part else "estimator"), text
    homes = [group for group in ORDER if text in choices(group)]
    if len(homes) > 1:
        ways = " or ".join(f"zoft show {home}/{text}" for home in homes)
        raise UserError(f"{text!r} is a choice of several groups: {ways}")
    if not homes:
        everything = {*ORDER, *_SECTIONS, *(name for group in ORDER for name in choices(group))}
        keys = [f"{g}.{text}" for g in (*_SECTIONS, *GROUPS) if any(row[0] == text for _, row in _rows_of(g))]
        near = f" Did you mean {' or '.join(keys[:3])}?" if keys else did_you_mean(text, everything)
        near = near if near.startswith(" Did") else ""
        raise UserError(f"there is nothing called {text!r}.{near} zoft ls lists everything")
    return homes[0], text


def _component(group: str, name: str, cls: type[Component]) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    about = re.split(r"\n\n?(?:Args|References|Example):", text)[0].strip()
    lines = [f"{group}={name}", "", about]
    fields = describe(cls)
    if fields:
        lines += ["", "Settings:", *_settings(group, fields)]
    references = re.search(r"References: ?(.+?)(?:\n\n|\Z)", text, re.S)
    if references:
        lines += ["", "References: " + " ".join(references.group(1).split())]
    return "\n".join(lines)
