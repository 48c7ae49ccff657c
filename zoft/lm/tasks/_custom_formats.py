"""What a user's rows can be, the names their columns go by, and which of them a first row is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.tasks._layouts import SHAPED

_WORDS_OF_CONTENT = 4  # in a column's name: it is a cell of a file without a header
Columns = dict[str, Any]
"""Role -> the column that plays it; ``choices`` may be several columns."""


@dataclass(frozen=True)
class Format:
    """One kind of rows.

    Args:
        what: in words.
        roles: role -> the names its column is found by, whatever their case.
        settings: those of the task's settings that it reads.
        needs_list: a role whose value is a list or a mapping, or this is another format.
        hides: formats that such a row also looks like, and is not.
    """

    what: str
    roles: dict[str, tuple[str, ...]]
    settings: tuple[str, ...] = ("template", "columns")
    needs_list: str = ""
    hides: tuple[str, ...] = ()


_WRITTEN = ("prompt", "input", "system", "question", "text")  # roles that a template takes the place of
_PROMPTS = ("prompt", "instruction", "question", "query")
_ABOUT = ("input", "context")  # what an instruction or a question is about
_SYSTEM = ("system", "system_prompt")
FORMATS = {
    "text_label": Format(
        "text + label",
        {
            "text": ("text", "sentence", "review", "message", "content"),
            "label": ("label", "labels", "class", "category", "target"),
        },
        settings=("template", "words", "label", "columns"),
    ),
    "multiple_choice": Format(
        "question, choices and answer",
        {
            "question": ("question", "prompt", "query", "context", "ctx", "sentence"),
            "choices": ("choices", "options", "endings"),
            "answer": ("answer", "answerkey", "label", "correct", "target"),
        },
        needs_list="choices",
        hides=("text_label", "completion"),
    ),
    "completion": Format(
        "prompt + completion",
        {
            "prompt": _PROMPTS,
            "input": _ABOUT,
            "system": _SYSTEM,
            "completion": ("completion", "response", "output", "answer"),
        },
    ),
    "chat": Format(
        "chat messages",
        {"messages": ("messages", "conversations", "conversation"), "system": _SYSTEM},
        settings=("columns",),
        needs_list="messages",
        hides=("text_label",),
    ),
    "preference": Format(
        "chosen and rejected answers",
        {
            "prompt": _PROMPTS,
            "input": _ABOUT,
            "system": _SYSTEM,
            "chosen": ("chosen", "chosen_response"),
            "rejected": ("rejected", "rejected_response"),
        },
        hides=("text_label", "completion", "chat"),
    ),
    "reward": Format(
        "prompt + reward",
        {
            "prompt": _PROMPTS,
            "input": _ABOUT,
            "system": _SYSTEM,
            "reward": ("reward", "answer", "solution", "target", "completion"),
        },
    ),
}
"""Every format by the name that ``task.format`` takes."""

OPTIONAL = {
    *((name, role) for name in ("completion", "chat", "preference", "reward") for role in ("input", "system")),
    ("preference", "prompt"),
    ("text_label", "text"),
    ("reward", "reward"),
}
"""(format, role) that rows can do without: chosen and rejected chats hold their prompt, a template names its texts, and
a reward function needs nothing but the prompt."""


@dataclass(frozen=True)
class Reading:
    """How a source's rows are read.

    Args:
        format: a key of :data:`FORMATS`.
        columns: which column plays which role.
        unused: columns that nothing reads.
        found: whether the format comes from the columns, and not from a setting.
    """

    format: str
    columns: Columns
    unused: tuple[str, ...]
    found: bool

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that play a role."""
        return tuple(name for column in self.columns.values() for name in _listed(column))

    def sentence(self) -> str:
        """What was found, for people.

        Example:
            >>> Reading("completion", {"prompt": "question", "completion": "answer"}, ("id",), True).sentence()
            'prompt + completion (format=completion, found: prompt=question, completion=answer; not used: id)'
        """
        roles = ", ".join(f"{role}={'+'.join(_listed(column))}" for role, column in self.columns.items())
        sentence = ", ".join(filter(None, (f"format={self.format}", "found" if self.found else "as set")))
        sentence += f": {roles}" if roles else ""
        return f"{FORMATS[self.format].what} ({sentence}" + (
            f"; not used: {listed(self.unused)})" if self.unused else ")"
        )


def reading(
    row: Mapping[str, Any],
    where: str,
    *,
    format: str = "auto",
    columns: Columns | None = None,
    label: str = "",
    words: bool = False,
    template: Iterable[str] = (),
) -> Reading:
    """What a row is, from its columns and from what was set.

    Args:
        row: the first one of a source.
        where: its place.
        format: a key of :data:`FORMATS`, or auto.
        columns: role -> column, as set.
        label: the label's column, as set.
        words: whether words for labels are set, which only ``text_label`` has.
        template: the columns that the template names.

    Raises:
        UserError: no format fits, several do, or a column that was named is not there.

    Example:
        >>> reading({"question": "2 + 2?", "answer": "4", "id": 7}, "sums.jsonl:1").format
        'completion'
    """
    given = dict(columns or {}) | ({"label": label} if label else {})
    for name in [name for column in given.values() for name in _listed(column)]:
        if name not in row:
            raise UserError(f"{where} has no {name!r} (its columns: {listed(row)}).{did_you_mean(name, map(str, row))}")
    chosen, is_found = format, False
    if chosen == "auto" and (words or label):
        chosen = "text_label"
    if chosen == "auto":
        chosen, is_found = _fitting(row, where, given), True
    roles = FORMATS[chosen].roles
    for role in given:
        if role not in roles:
            raise UserError(f"task.columns: format={chosen} has no {role!r}.{did_you_mean(role, roles)}")
    settled = _settled(chosen, row, given)
    missing = [role for role in roles if role not in settled and (chosen, role) not in OPTIONAL]
    templated = list(template)
    if templated and missing and missing[0] in _WRITTEN:
        missing = missing[1:]
    if missing:
        setting = "task.label=COLUMN" if chosen == "text_label" else f"'task.columns={{{missing[0]}: COLUMN}}'"
        raise UserError(
            f"{where} has no column for {missing[0]!r} of format={chosen} (its columns: {listed(row)}): "
            f"{_parted_otherwise(row)}name it, {setting}"
        )
    if templated:
        for role in given:
            if role in _WRITTEN:
                raise UserError(
                    f"task.columns names the {role}, and task.template is what is read: leave one of them out"
                )
        settled = {role: column for role, column in settled.items() if role not in _WRITTEN}
    used = {name for column in settled.values() for name in _listed(column)} | set(templated)
    return Reading(chosen, settled, tuple(str(name) for name in row if name not in used), is_found)


def listed(names: Iterable[Any]) -> str:
    """Column names in a message, cut where there are too many to read; said of them that they look like a row."""
    names = [str(name) for name in names]
    text = ", ".join(name[:60] for name in names)
    text = text if len(text) <= 240 else text[:240] + "..."
    is_row = any(len(name.split()) >= _WORDS_OF_CONTENT or re.fullmatch(r"[-+]?[\d.]+", name) for name in names)
    return text + "; if these are a row, put a line with the columns' names above it" * is_row


def _fitting(row: Mapping[str, Any], where: str, given: Columns) -> str:
    fits = []
    for name, format in FORMATS.items():
        settled = _settled(name, row, given)
        complete = all(role in settled or (name, role) in OPTIONAL for role in format.roles)
        nested = format.needs_list and isinstance(settled.get(format.needs_list), str)
        if name == "reward" and "reward" not in settled and not _all_read(row, settled):
            continue
        if complete and given.keys() <= format.roles.keys():
            if nested and not isinstance(row[settled[format.needs_list]], list | dict):
                continue
            fits.append(name)
    hidden = {other for name in fits for other in FORMATS[name].hides}
    if "completion" in fits and "instruction" in map(str.lower, map(str, row)):
        hidden.add("text_label")  # Dolly's category is no label
    if len(fits) > 1 and "reward" in fits and str(_settled("reward", row, given).get("reward")).lower() != "reward":
        hidden.add("reward")  # what other rows call their answer, or nothing at all
    fits = [name for name in fits if name not in hidden]
    if len(fits) > 1:
        raise UserError(
            f"{where} could be {' or '.join(fits)} by its columns ({listed(row)}): say which, task.format={fits[0]}"
        )
    if not fits:
        raise UserError(
            f"{where}: the columns ({listed(row)}) fit no format: name one and its columns, e.g. "
            "task.format=completion 'task.columns={prompt: COLUMN, completion: COLUMN}', or "
            "task.format=text_label task.label=COLUMN "
            f"(formats: {', '.join(FORMATS)})"
        )
    return fits[0]


def _settled(name: str, row: Mapping[str, Any], given: Columns) -> Columns:
    """Role -> column, the given ones first and then those found by name; no column plays two roles."""
    settled: Columns = {}
    taken = {one for column in given.values() for one in _listed(column)}
    lower = {str(column).lower(): str(column) for column in reversed(list(row))}
    for role, aliases in FORMATS[name].roles.items():
        column = given.get(role) or next((lower[a] for a in aliases if a in lower and lower[a] not in taken), None)
        if role == "input" and role not in given and str(settled.get("prompt")).lower() not in SHAPED:
            continue  # a whole prompt is about nothing else
        if column:
            settled[role] = column
            taken.update(_listed(column))
    return settled


def _all_read(row: Mapping[str, Any], settled: Columns) -> bool:
    """Whether no text is left beside the columns that play a role."""
    return all(name in settled.values() or not isinstance(value, str | list | dict) for name, value in row.items())


def _listed(column: Any) -> list[str]:
    return [str(one) for one in column] if isinstance(column, list | tuple) else [str(column)]


def _parted_otherwise(row: Mapping[str, Any]) -> str:
    """That a csv's one column looks like several, parted by another character than its name says."""
    (name, *others) = row
    mark = next((mark for mark in ";\t|" if mark in str(name)), "") if not others else ""
    return f"cells are parted by commas in a .csv and by tabs in a .tsv, not by {mark!r}; convert it, or " * bool(mark)
