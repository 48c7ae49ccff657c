r"""Text is taken as it is written: YAML's and Hydra's own types (No, 01, 1e1, true) do not count where text belongs.

The places come from the types of the fields: a ``str`` is text, and so are the keys and values of ``dict[Any, str]``.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from functools import lru_cache
from typing import Any

import yaml

from zoft.component import GROUPS, components
from zoft.config import training_arguments
from zoft.config.schema import ZoftConfig
from zoft.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    r"""A place for text, or for a list of texts.

    Args:
        nulls: whether ``null`` is a text there, and not nothing.
        escapes: whether ``\n`` is a line break in an argument, and ``\t`` a tab.
    """

    nulls: bool = False
    escapes: bool = False


@dataclasses.dataclass(frozen=True)
class Each:
    """A mapping whose keys are text, or a list of texts.

    Args:
        value: what its values are.
    """

    value: Any


Places = Any
"""Where text is expected: Text, Each, a dict of key -> Places, or None where it is not."""


@lru_cache
def places() -> dict[str, Places]:
    """Those of a whole run; a group's are those of all its components together."""
    places_by_key = dict(_places_of(ZoftConfig))
    for group in GROUPS:
        places_by_key[group] = {}
        for cls in components(group).values():
            places_by_key[group] |= _places_of(cls, getattr(cls, "escapes", ()))
    annotations = training_arguments.fields()
    places_by_key["trainer"] = {name: Text() for name, kind in annotations.items() if kind in ("str", "str | None")}
    return places_by_key | {"defaults": Each(Text())}


def own_places(group: str, cls: type) -> None:
    """Add those of a part that is not among the components of its group."""
    places()[group] |= _places_of(cls, getattr(cls, "escapes", ()))


def _places_of(cls: type, escapes: tuple[str, ...] = ()) -> dict[str, Places]:
    hints = typing.get_type_hints(cls)
    places = {field.name: _place_of(hints[field.name], field.name in escapes) for field in dataclasses.fields(cls)}
    if "columns" in places:  # role -> a name or several, for which there is no type
        places["columns"] = Each(Text(nulls=True))
    return {name: place for name, place in places.items() if place is not None}


def _place_of(hint: Any, escapes: bool) -> Places:
    arguments = typing.get_args(hint)
    if hint in (str, str | None, list[str], list[str] | None):
        return Text(escapes=escapes)
    if typing.get_origin(hint) is dict and arguments[1] is str:
        return Each(Text(nulls=True, escapes=escapes))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and not arguments:
        return _places_of(hint)
    return None


# ---- files -----------------------------------------------------------------------------------------------------------


def load(text: str, where: Places, loader: Any) -> Any:
    """The plain values of a YAML document, with text as it is written where text is expected.

    Args:
        text: of the document.
        where: its places for text.
        loader: a class of PyYAML's loaders.

    Raises:
        yaml.YAMLError: it is not YAML.

    Example:
        >>> load("{words: {neg: No, 01: Yes}, count: 01}", {"words": Each(Text())}, yaml.SafeLoader)
        {'words': {'neg': 'No', '01': 'Yes'}, 'count': 1}
    """
    refuse_bombs(text)
    reading = loader(text)
    try:
        node = reading.get_single_node()
        _keep(node, where)
        return None if node is None else reading.construct_document(node)
    finally:
        reading.dispose()


_MERGE = "tag:yaml.org,2002:merge"
_LARGEST, _DEEPEST, _MOST_NODES = 1 << 22, 100, 200_000  # bytes, levels, values once aliases are followed


@lru_cache
def refuse_bombs(text: str) -> None:
    """Refuse a document that becomes much larger than it is: by aliases of aliases, or by nesting.

    Raises:
        yaml.YAMLError: it does, or is no YAML.
    """
    if len(text) > _LARGEST:
        raise yaml.YAMLError(f"it has more than {_LARGEST:,} characters")
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, values before it)
    total = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise yaml.YAMLError(f"its value &{event.anchor} holds itself")
            total += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > _MOST_NODES:
            raise yaml.YAMLError(f"its aliases make more than {_MOST_NODES:,} values of it")
        if len(open_nodes) > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")


def _keep(node: Any, where: Places) -> None:
    """Tag the scalars as text that stand where text is expected."""
    if isinstance(where, Text):
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            _tag(item, nulls=where.nulls)
    elif isinstance(where, Each):
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                _keep(item, where if isinstance(item, yaml.MappingNode) else Text())
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                _tag(key, nulls=True)
                _keep(value, where if key.tag == _MERGE else where.value)
    elif where and isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _keep(value, where if key.tag == _MERGE else where.get(key.value))


def _tag(node: Any, *, nulls: bool) -> None:
    merges, is_null = node.tag == _MERGE, node.tag == "tag:yaml.org,2002:null"
    nothing = is_null and (not nulls or not node.value)
    if isinstance(node, yaml.ScalarNode) and node.style is None and not merges and not nothing:
        node.tag = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG


# ---- arguments -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[{}\[\](),]|[^'"{}\[\](),]+""", re.S)
_TYPED = re.compile(r"(?i)true|false|null|[+-]?(?:nan|inf|infinity)|[+-]?[\d._]*\d[\d._]*(?:e[+-]?\d+)?")
_FUNCTION = re.compile(r"\w+\(")
_LOST_AS_NAME = re.compile(r"(?i)null|[+-]?(?:nan|inf|infinity|[\d.]+e[+-]?\d+|\d[\d.]*_[\d._]*)|'[^']*'|\"[^\"]*\"")
"""Names in a mapping that Hydra reads as another number or as nothing, or does not read: it has no quotes for names."""
_ESCAPE = re.compile(r"(\\+)([nt])")
_ESCAPES = {"n": "\n", "t": "\t"}


def argument(text: str) -> str:
    r"""An argument with quotes round what Hydra would take for a number, a truth value or null where text is expected.

    Where it sets text that a model reads, ``\n`` becomes a line break and ``\t`` a tab; ``\\n`` is a backslash and n.

    Args:
        text: ``key=value``.

    Raises:
        UserError: a name in a mapping that an argument cannot say.

    Example:
        >>> argument("task.words={neg: no, pos: true}"), argument("task.template='{text}\\nSpam?'")
        ("task.words={neg: no, pos: 'true'}", "task.template='{text}\nSpam?'")
    """
    key, equals, value = text.partition("=")
    where: Places = places()
    for part in key.lstrip("+").split("."):
        where = where.value if isinstance(where, Each) else where.get(part) if isinstance(where, dict) else None
    is_file = key == "config" and os.path.isfile(value)  # `a (1).yaml`: whole, where arguments are parsed
    if is_file or not equals or not isinstance(where, Text | Each) or _FUNCTION.match(value):
        return text
    if isinstance(where, Each):
        for name in _names(value):
            if _LOST_AS_NAME.fullmatch(name):
                raise UserError(
                    f"{text}: an argument cannot hold the name {name}, which is read as a number or as nothing: write "
                    "it in a file (config=FILE), where names are text"
                )
    return f"{key}={_quoted(value, where.value if isinstance(where, Each) else where)}"


def _names(value: str) -> list[str]:
    """The keys of a mapping in an argument, as they are written."""
    names, opened, before = [], "", ""
    for token in _TOKEN.findall(value):
        if token in tuple("{[("):
            opened += token
        elif token in tuple("}])"):
            opened = opened[:-1]
        elif opened == "{" and before in ("{", ",") and token[0] not in "'\"":
            names.append(token.partition(":")[0].strip())
        elif opened == "{" and before in ("{", ","):
            names.append(token)
        before = token
    return names


def _quoted(value: str, where: Text) -> str:
    tokens = _TOKEN.findall(value)
    if "".join(tokens) != value:
        return value  # a quotation mark without its other one: Hydra says so
    done, brackets, of_key = [], "", False
    for token in tokens:
        if token in tuple("{[("):
            brackets, of_key = brackets + token, token == "{"
        elif token in tuple("}])"):
            brackets, of_key = brackets[:-1], False
        elif token == ",":
            of_key = brackets.endswith("{")
        elif token[0] in "'\"":
            token = _unescaped(token, where)
        else:
            before, colon, rest = token.partition(":") if of_key else ("", "", token)
            of_key = of_key and not colon
            token = token if of_key else f"{before}{colon}{_run(rest, where, nulls=bool(brackets) or where.nulls)}"
        done.append(token)
    return "".join(done)


def _run(text: str, where: Text, *, nulls: bool) -> str:
    """A value without quotes, with quotes where it needs some."""
    bare = text.strip()
    unescaped = _unescaped(bare, where)
    typed = _TYPED.fullmatch(bare) and (nulls or bare.lower() != "null")
    return text.replace(bare, f"'{unescaped}'") if bare and (typed or unescaped != bare) else text


def _unescaped(text: str, where: Text) -> str:
    return _ESCAPE.sub(_meant, text) if where.escapes else text


def _meant(match: re.Match[str]) -> str:
    """Each pair of the backslashes before n or t is one backslash; one that is left over makes the letter an escape."""
    pairs, left_over = divmod(len(match[1]), 2)
    return "\\" * pairs + (_ESCAPES[match[2]] if left_over else match[2])
