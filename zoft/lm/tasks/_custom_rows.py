"""One row of a user's data to one example; a row that does not fit is one sentence with its place."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.lm.data.examples import Chat, Completion, Example, Message, PreferencePair, Rated
from zoft.lm.tasks import _layouts
from zoft.lm.tasks._custom_formats import Columns, listed
from zoft.lm.tasks._labels import label_key, spelled

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_KINDS = {bool: "true or false", list: "a list", dict: "a mapping", type(None): "nothing", str: "text"}


@dataclass(frozen=True)
class Template:
    r"""A prompt with columns in braces; ``str.format`` would reach attributes of the values.

    Args:
        pieces: (text, the column behind it or None).

    Example:
        >>> Template.of("{text}\nSpam?").filled({"text": " win {text} "}, "mail.csv:2")
        'win {text}\nSpam?'
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, text: str) -> Template:
        """From its text.

        Raises:
            UserError: a brace without its other one, nothing in braces, or more than a column's name.
        """
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"task.template={text!r} is broken: {error}; a brace itself is {{{{ or }}}}") from None
        if not any(name for _, name, _, _ in parsed) or any(name == "" or spec or how for _, name, spec, how in parsed):
            raise UserError(
                f"task.template={text!r} must hold columns in braces and nothing else in them, e.g. '{{text}} It was'"
            )
        return cls(tuple((piece, name) for piece, name, _, _ in parsed))

    @classmethod
    def bare(cls, columns: Sequence[str]) -> Template:
        r"""The columns' text and nothing else, each on a line of its own.

        Example:
            >>> Template.bare(["a", "b"]).filled({"a": "It rains.", "b": "It pours."}, "mail.csv:2")
            'It rains.\nIt pours.'
        """
        return cls(tuple(("\n" if place else "", name) for place, name in enumerate(columns)))

    @property
    def columns(self) -> list[str]:
        """The columns it names."""
        return [name for _, name in self.pieces if name is not None]

    @property
    def ending(self) -> str:
        """What stands behind the last column: the prompt without the row's content."""
        return (self.pieces[-1][0] if self.pieces[-1][1] is None else "").strip()

    def filled(self, row: Row, where: str) -> str:
        """The prompt of a row, blanks around the values left out.

        Raises:
            UserError: a column that is not there, or nothing in any of them: the same prompt would stand in many rows.
        """
        values = {name: text_of(row, name, where).strip() for name in self.columns}
        if not any(values.values()):
            raise UserError(f"{where}: {listed(values)!r} is empty: fill it in, or leave the row out")
        return "".join(text + ("" if name is None else values[name]) for text, name in self.pieces)


def value_of(row: Row, column: str, where: str) -> Any:
    """``row[column]``, which must be there and not be null."""
    value = row.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{where} has no {column!r} (its columns: {listed(row)})")
    return value


def text_of(row: Row, column: str, where: str, *, filled: bool = False) -> str:
    """A column's text; a number is text too, a list is not."""
    return as_text(value_of(row, column, where), column, where, filled=filled)


def as_text(value: Any, name: str, where: str, *, filled: bool = False) -> str:
    """A value that is to be text, under the name that an error gives it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name!r} must be text, got {_kind(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name!r} holds half a character (\\u{ord(text[error.start]):04x})") from None
    if filled and not text.strip():
        raise UserError(f"{where}: {name!r} is empty: fill it in, or leave the row out")
    return text


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def text_label(
    row: Row, where: str, columns: Columns, template: Template, words: Mapping[str, str], *, head: bool
) -> Example:
    """Text + label, as a choice between the labels' words, or as a class of a ``head`` in the order of the words."""
    label = label_of(row, columns["label"], where)
    if label not in words:
        what = "class" if head else "word"
        raise UserError(f"{where}: label {label[:80]!r} has no {what}.{did_you_mean(label[:80], words)}")
    prompt = template.filled(row, where)
    options = () if head else tuple(f" {word.strip()}" for word in words.values())
    return Example(prompt, options, list(words).index(label), domain=template.ending)


def label_of(row: Row, column: str, where: str) -> str:
    """A row's label, by :func:`zoft.lm.tasks._labels.label_key`.

    Raises:
        UserError: the row has none.
    """
    try:
        label = label_key(row.get(column))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if label is None:
        why = f"is not there (its columns: {listed(row)})"
        if column in row:
            why = "is empty: fill it in, or leave the row out"
        raise UserError(f"{where}: no label: {column!r} {why}")
    return label


def multiple_choice(row: Row, where: str, columns: Columns, template: Template | None) -> Example:
    """Question, choices and answer, as a choice between the row's own options."""
    keys, choices = _choices(row, where, columns["choices"])
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"{where}: the choices must be two or more different texts, got {str(choices)[:120]}")
    if template:
        prompt, ending = template.filled(row, where), template.ending
    else:
        prompt, ending = (
            f"Question: {text_of(row, columns['question'], where, filled=True).strip()}\nAnswer:",
            "Answer:",
        )
    options = tuple(f" {choice}" for choice in choices)
    return Example(prompt, options, _gold(value_of(row, columns["answer"], where), keys, choices, where), domain=ending)


def _choices(row: Row, where: str, columns: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """(the names that answers may call them by, the choices)."""
    if not isinstance(columns, str):
        names = [str(name) for name in columns]
        return names, [text_of(row, name, where, filled=True).strip() for name in names]
    value = value_of(row, columns, where)
    if isinstance(value, str):  # a cell of a csv file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(
                f"{where}: {columns!r} must be a list, got a text that is no JSON list; choices in columns of their "
                "own are named by 'task.columns={choices: [a, b, c]}'"
            ) from None
    keys: Any = None
    if isinstance(value, dict):  # {"text": [...], "label": [...]}, as ARC has it
        keys, value = value.get("label"), value.get("text")
    if not isinstance(value, list) or not (keys is None or (isinstance(keys, list) and len(keys) == len(value))):
        raise UserError(f"{where}: {columns!r} must be a list of texts, or {{text: [...], label: [...]}} of one length")
    texts = [as_text(one, columns, where, filled=True).strip() for one in value]
    letters = list(string.ascii_uppercase[: len(texts)])
    return ([as_text(key, columns, where) for key in keys] if keys is not None else letters), texts


def _gold(answer: Any, keys: list[str], choices: list[str], where: str) -> int:
    """Which choice an answer means: its text, its letter or key, or its number from 0."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: the answer must be text or a number, got {_kind(answer)}")
    text = label_key(answer) or ""
    written = spelled(answer)
    by_text = next((place for place, choice in enumerate(choices) if choice in (written, text)), None)
    by_key = next((place for place, key in enumerate(keys) if key in (written, text)), None)
    by_number = int(text) if text.isdecimal() and len(text) < 4 and int(text) < len(choices) else None
    meant = [index for index in (by_text, by_key, None if by_key is not None else by_number) if index is not None]
    if len(set(meant)) > 1:
        raise UserError(
            f"{where}: the answer {text!r} is the text of one choice and the number or key of another: write its text "
            "out, or the letters A, B, C"
        )
    if not text:
        raise UserError(f"{where}: no answer")
    if not meant:
        shown = ", ".join(repr(choice[:30]) for choice in choices[:6])
        raise UserError(f"{where}: the answer {text[:60]!r} is none of the choices ({shown}), their letters or numbers")
    return meant[0]


def completion(row: Row, where: str, columns: Columns, template: Template | None) -> Completion:
    """Prompt + completion, both as they stand; or as known layouts mean them (:mod:`zoft.lm.tasks._layouts`)."""
    prompt = _prompt(row, where, columns, template)
    return Completion(prompt, _answer(row, columns["completion"], where, columns, template, prompt), where)


def reward(row: Row, where: str, columns: Columns, template: Template | None) -> Rated:
    """Prompt + reward; a row without one leaves the judging to the function."""
    if "reward" not in columns:
        return Rated(_prompt(row, where, columns, template), None, where)
    value = value_of(row, columns["reward"], where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: 'reward' must be a number or text, got {_kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: 'reward' must be finite, got {value}")
    if isinstance(value, str):
        as_text(value, "reward", where, filled=True)
    return Rated(_prompt(row, where, columns, template), value, where)


def chat(row: Row, where: str, columns: Columns) -> Chat:
    """Messages; the assistant says something in them."""
    turns = _chat(value_of(row, columns["messages"], where), columns["messages"], where)
    return _with_system(turns, _optional(row, "system", columns, where))


def preference(row: Row, where: str, columns: Columns, template: Template | None) -> PreferencePair:
    """Prompt, chosen and rejected; these are texts behind the prompt, or chats, which may hold it themselves."""
    answers = {role: value_of(row, columns[role], where) for role in ("chosen", "rejected")}
    sides: list[Any]
    if all(isinstance(answer, list) for answer in answers.values()):
        sides = _chats(answers, row, where, columns, template)
    else:
        parted = _layouts.dialogue(*map(str, answers.values()))
        if "prompt" not in columns and template is None and parted:
            prompt, *ends = parted
            sides = [Completion(prompt, as_text(end, "chosen", where, filled=True), where) for end in ends]
            return PreferencePair(sides[0], sides[1], where)
        if "prompt" not in columns and template is None:
            raise UserError(
                f"{where} has no prompt (its columns: {listed(row)}): name it, 'task.columns={{prompt: COLUMN}}'"
            )
        prompt = _prompt(row, where, columns, template)
        sides = [
            Completion(prompt, _answer(row, columns[role], where, columns, template, prompt), where) for role in answers
        ]
    if sides[0] == sides[1]:
        raise UserError(f"{where}: chosen and rejected are the same: remove the row, or let them differ")
    return PreferencePair(sides[0], sides[1], where)


def _chats(answers: Row, row: Row, where: str, columns: Columns, template: Template | None) -> list[Chat]:
    """Both answers as chats, behind the prompt where they do not hold it."""
    column = columns.get("prompt", "task.template")
    system = _optional(row, "system", columns, where)
    prompt = template.filled(row, where) if template else row.get(column)
    before = prompt if isinstance(prompt, list) else []
    chats = [_with_system(_chat(before + answer, columns[role], where), system) for role, answer in answers.items()]
    if prompt is None or isinstance(prompt, list):
        return chats
    text = as_text(prompt, column, where).strip()
    return [_asked(chat, text, columns[role]) for role, chat in zip(answers, chats, strict=True)]


def _asked(chat: Chat, prompt: str, column: str) -> Chat:
    """The chat with the prompt in it: as it is where a message holds it, else with a user's message in front."""
    if not prompt or any(m["role"] in ("user", "system") and m["content"].strip() == prompt for m in chat.messages):
        return chat
    start = next((place for place, message in enumerate(chat.messages) if message["role"] != "system"), 0)
    first = chat.messages[start]
    if first["role"] == "user":
        difference = f"{column!r} begins with the user's {first['content'][:60]!r} and the prompt is {prompt[:60]!r}"
        raise UserError(f"{chat.where}: {difference}: make them the same, or leave one of them out")
    asked: Message = {"role": "user", "content": prompt}
    return Chat((*chat.messages[:start], asked, *chat.messages[start:]), chat.where)


def _prompt(row: Row, where: str, columns: Columns, template: Template | None) -> str:
    if template:
        return template.filled(row, where)
    asked = text_of(row, columns["prompt"], where, filled=True)
    about, system = (_optional(row, role, columns, where) for role in ("input", "system"))
    return _layouts.prompt_of(columns["prompt"], asked, about, system)


def _answer(row: Row, column: str, where: str, columns: Columns, template: Template | None, prompt: str) -> str:
    answer = text_of(row, column, where, filled=True)
    return answer if template else _layouts.answer_behind(prompt, answer, columns["prompt"])


def _optional(row: Row, role: str, columns: Columns, where: str) -> str:
    """A column's text; empty where the rows have no such column, or this one nothing in it."""
    value = row.get(columns.get(role, ""))
    return "" if value is None else as_text(value, columns[role], where)


def _with_system(chat: Chat, system: str) -> Chat:
    """The chat behind the row's own system message."""
    systems = [message["content"].strip() for message in chat.messages if message["role"] == "system"]
    if not system.strip() or system.strip() in systems:
        return chat
    if systems:
        raise UserError(
            f"{chat.where}: the row's system message {system.strip()[:60]!r} is not the chat's own, "
            f"{systems[0][:60]!r}: leave one of them out"
        )
    return Chat(({"role": "system", "content": system}, *chat.messages), chat.where)


def _chat(value: Any, column: str, where: str) -> Chat:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: {column!r} must be a list of messages, got {'an empty one' if value == [] else _kind(value)}"
        )
    messages = tuple(_message(one, f"{column}[{place}]", where) for place, one in enumerate(value))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: no message of {column!r} is the assistant's: there is nothing to train on")
    return Chat(messages, where)


def _message(value: Any, name: str, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {name} must be a message with role and content, got {_kind(value)}")
    value = {key: part for key, part in value.items() if part is not None}  # parquet has every key in every message
    if "role" not in value and "from" in value:  # as ShareGPT has it
        value = {"role": value.pop("from"), "content": value.pop("value", None)} | value
    more = [str(key) for key in value if key not in ("role", "content")]
    if more:
        raise UserError(f"{where}: {name} has {more[0][:60]!r}, which is not read: only role and content are")
    role = _layouts.ROLES.get(str(value.get("role")), str(value.get("role")))
    if role not in ROLES:
        raise UserError(f"{where}: {name}: the role must be one of {', '.join(ROLES)}, got {role[:40]!r}")
    content = as_text(_joined(value.get("content")), f"{name}.content", where, filled=role == "assistant")
    return {"role": role, "content": content}


def _joined(content: Any) -> Any:
    """OpenAI's list of text parts as one text; anything else as it is."""
    parts: list[Any] = content if isinstance(content, list) and content else [None]
    if all(isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" for part in parts):
        return "".join(str(part["text"]) for part in parts)
    return content
