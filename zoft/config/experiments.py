"""Experiments by name or path: `config=quickstart`, `config=mine`, `config=some/where/mine.yaml`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from zoft.config import auto, own, texts
from zoft.config.catalog import ORDER, choices, preset_files
from zoft.errors import UserError, did_you_mean
from zoft.utils.files import at_home


class Experiments:
    """The experiments that arguments named; their contents are read once and travel to a sweep's workers."""

    def __init__(self) -> None:
        self.contents: dict[str, DictConfig] = {}  # as named by the user -> content
        self.files: dict[str, str] = {}  # registered name -> file, as the user would write it
        self.labels: dict[str, str | None] = {"config": None, "method": None}
        self.trusted: set[tuple[str, str]] = set()  # parts of own files that the command line names

    def register(self, choice: str) -> str:
        """Make an experiment known to Hydra.

        Args:
            choice: a name or a path.

        Returns:
            The name it is registered under in the group ``config``.
        """
        file = find(choice)
        if choice not in self.contents:
            content = read(file, str(file))
            self._with_own_parts(content, str(file))
            auto.take_out(content)
            check_defaults(content, str(file))
            self.contents[choice] = content
        name = own.hydra_name("_", str(file))
        self.files[name] = str(file)
        self.labels["config"] = file.stem
        ConfigStore.instance().store(
            group="config", name=name, node=self.contents[choice].copy(), package="_global_", provider="zoft"
        )
        return name

    def _with_own_parts(self, content: DictConfig, where: str) -> None:
        """Parts of own files in ``defaults:`` by Hydra's names for them."""
        entries: Any = OmegaConf.to_container(content, resolve=False)
        if isinstance(entries.get("defaults"), list):
            content.defaults = [
                own.resolve(entry, self.trusted, where) if isinstance(entry, dict) else entry
                for entry in entries["defaults"]
            ]

    def file_of(self, config_path: str) -> str | None:
        """The file behind a path of the defaults list, when it is an experiment's."""
        return self.files.get(config_path.removeprefix("config/"))


def is_path(choice: str) -> bool:
    """Whether ``config=`` was given a path rather than a name."""
    return "/" in choice or choice.endswith((".yaml", ".yml"))


def find(choice: str) -> Path:
    """The file of an experiment.

    Raises:
        UserError: no such file or experiment; the near ones are named.
    """
    if is_path(choice):
        file = at_home(choice)
        if file.is_dir():
            raise UserError(f"config={choice} is a folder; name a YAML file in it")
        if not file.is_file():
            siblings = [item.name for item in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
            raise UserError(f"config={choice}: there is no such file.{did_you_mean(file.name, siblings)}")
        return file
    files = preset_files("config")
    if choice not in files:
        raise UserError(f"there is no config called {choice!r}.{did_you_mean(choice, files)}")
    return files[choice]


def read(file: Path, where: str, places: Any = None) -> DictConfig:
    """A YAML file as a mapping, with text as it is written.

    Args:
        file: the file.
        where: what it is called in messages.
        places: where text is expected in it; None: as in a run.

    Raises:
        UserError: it cannot be read, or is not a mapping.
    """
    places = texts.places() if places is None else places
    try:
        values = texts.load(file.read_text(encoding="utf-8"), places, get_yaml_loader())
    except yaml.YAMLError as error:
        raise UserError(yaml_message(error, where)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{where}: a config is a mapping of keys to values (key: value)")
    return OmegaConf.create(values or {})


def check_defaults(content: DictConfig, where: str) -> None:
    """Refuse an experiment whose ``defaults:`` choose what does not exist; Hydra would not say which file did."""
    entries: Any = OmegaConf.to_container(content, resolve=False)
    entries = entries.get("defaults", [])
    if not isinstance(entries, list):
        raise UserError(f"{where}: defaults is a list: one `- override /group: NAME` a line")
    for entry in entries:
        if isinstance(entry, str):
            name = entry.removeprefix("/config/")
            if name != "_self_" and name not in preset_files("config"):
                near = did_you_mean(name, preset_files("config"))
                raise UserError(f"{where}: defaults: there is no config called {name!r}.{near}")
        elif isinstance(entry, dict):
            for key, value in entry.items():
                _check_choice(str(key), value, where)
        else:
            raise UserError(f"{where}: defaults: cannot read {entry!r}: write `- override /group: NAME`")


def _check_choice(key: str, value: Any, where: str) -> None:
    group = re.sub(r"^(override|optional)\s+", "", key).lstrip("/")
    if group in ("hydra/launcher", "config"):
        return
    if group not in ORDER:
        raise UserError(f"{where}: defaults: there is no group {group!r}.{did_you_mean(group, ORDER)}")
    if not re.match(r"override\s+/", key):
        raise UserError(f"{where}: defaults: write `- override /{group}: {value}` (with `override` and the slash)")
    if value is not None and str(value) not in choices(group) and not own.is_registered(group, str(value)):
        near = did_you_mean(str(value), choices(group))
        raise UserError(f"{where}: defaults: there is no {group} called {value!r}.{near}")


def yaml_message(error: yaml.YAMLError, where: str) -> str:
    """The place where a file stops being valid YAML, in one line."""
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"{where}{place}: not readable as YAML: {problem}"
