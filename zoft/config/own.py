"""Parts of a user's own files in a config: `estimator=./my_est.py:Wide`, taken from the command line alone."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.core.config_store import ConfigStore

from zoft.component import GROUPS, Component, components, from_file
from zoft.config import texts
from zoft.errors import UserError
from zoft.utils import own_files

_REGISTERED: dict[str, dict[str, type[Component]]] = {group: {} for group in GROUPS}


def known(group: str) -> dict[str, type[Component]]:
    """The components of a group by Hydra's names for them, those of a user's own files included."""
    return {**components(group), **_REGISTERED[group]}


def is_registered(group: str, name: str) -> bool:
    """Whether Hydra's name is that of a part of an own file."""
    return name in _REGISTERED.get(group, ())


def register(group: str, choice: str) -> str:
    """Import a part and make it known to Hydra.

    Args:
        group: of the part.
        choice: ``FILE.py:Class``.

    Returns:
        What Hydra calls it.

    Raises:
        UserError: there is no such file or class, or it is no part of that group.
    """
    cls = from_file(group, choice)
    name = hydra_name("_own_", cls.own_file)
    if _REGISTERED[group].get(name) is not cls:
        _REGISTERED[group][name] = cls
        ConfigStore.instance().store(group=group, name=name, node=cls, provider="zoft")
        texts.own_places(group, cls)
    return name


def hydra_name(prefix: str, path: str) -> str:
    """A name for a file that no other path has; Hydra's grammar knows no letters beyond ASCII."""
    return f"{prefix}{re.sub('[^A-Za-z0-9_]', '_', path)}_{zlib.crc32(path.encode('utf-8', 'surrogateescape')):08x}"


def register_named(overrides: Iterable[str]) -> set[tuple[str, str]]:
    """Register every part that arguments name; in a sweep an argument may name several.

    Args:
        overrides: as on the command line.

    Returns:
        (group, ``/abs/FILE.py:Class``) of each: the files that the user trusts.
    """
    names = set()
    for override in overrides:
        group, _, values = override.lstrip("+").partition("=")
        for value in values.split(",") if group in GROUPS else ():
            choice = value.strip("'\" ")
            if own_files.split(choice):
                register(group, choice)
                names.add((group, own_files.absolute(choice)))
    return names


def resolve(entry: dict[Any, Any], trusted: set[tuple[str, str]], where: str) -> dict[Any, Any]:
    """An entry of a file's ``defaults:`` with Hydra's name for a part of an own file.

    Args:
        entry: ``{"override /estimator": "/abs/my_est.py:Wide"}``.
        trusted: of :func:`register_named`.
        where: the file, for the message.

    Raises:
        UserError: the command line does not name the part: code is not run because a config says so.
    """
    resolved = {}
    for key, value in entry.items():
        group = str(key).rpartition("/")[2]
        resolved[key] = value
        if group in GROUPS and own_files.split(value):
            if (group, own_files.absolute(value)) not in trusted:
                raise UserError(
                    f"{where} names code to run, {group}={value}: a config is data, so write that on the command line "
                    f"too if you trust the file: {group}={value}"
                )
            resolved[key] = register(group, value)
    return resolved


def words(cfg: Any) -> list[str]:
    """The arguments that name a run's own files, which every command on it needs beside its folder.

    Args:
        cfg: of a run.

    Example:
        >>> from zoft.config import compose
        >>> words(compose(["config=quickstart"]))
        []
    """
    parts = {group: getattr(cfg, group) for group in GROUPS}
    return [f"{group}={part.own_file}" for group, part in parts.items() if part.own_file]


def code_words(cfg: Any) -> list[str]:
    """The arguments that name functions and scripts of an objective, which a run from its config file needs beside it.

    Args:
        cfg: of a run.

    Example:
        >>> from zoft.config import compose
        >>> code_words(compose(["config=reward", "task.train=x.jsonl", "objective.function=my:score"]))
        ['objective.function=my:score']
    """
    return list(_code_words("objective", vars(cfg.objective)))


def _code_words(path: str, settings: Any) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _code_words(f"{path}.{key}", value)
        elif isinstance(value, str) and ((key == "function" and value) or value.startswith("evaluate:")):
            yield f"{path}.{key}={value}"
