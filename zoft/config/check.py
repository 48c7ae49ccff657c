"""Whether keys exist and values have their type: every file and every argument is checked before it is merged."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from zoft.component import GROUPS, Component, components
from zoft.config import training_arguments
from zoft.config.catalog import ELSEWHERE, ORDER, PRESET_GROUPS
from zoft.config.experiments import Experiments, yaml_message
from zoft.config.schema import ZoftConfig
from zoft.errors import Conditions, UserError, did_you_mean
from zoft.trainer.values import COUNTS_WITH

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclasses.dataclass
class Checker:
    """Checks nested dicts against the schema, given which component each group holds.

    Args:
        chosen: group -> the class that was chosen for it.
        given: ``group.field`` -> its value, of arguments.
    """

    chosen: dict[str, type[Component]]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, data: dict[str, Any], where: str, replaced: frozenset[str] = frozenset()) -> dict[str, str]:
        """Refuse what does not fit; take out of ``data`` what belongs to a part that was replaced.

        Args:
            data: keys as a file or an argument sets them; changed in place.
            where: the file or argument, for the message.
            replaced: groups for which something of higher precedence chose another part than ``data`` was written for.

        Returns:
            The keys taken out, each with why.

        Raises:
            UserError: an unknown key or a value of another type, with the key that was probably meant.
        """
        refuse_targets(data, where)
        dropped: dict[str, str] = {}
        # in the order of the file: the first error is the one nearest to the top
        for key, value in data.items():
            if key == "hydra":
                _check_hydra(value, where)
                continue
            if key not in _hints(ZoftConfig):
                raise UserError(f"{where}: there is no key {key!r}.{_near_root(key)}")
            if key in GROUPS:
                dropped |= self._component(key, value, where, key in replaced)
            elif key == "trainer":
                dropped |= self._trainer(value, where)
            else:
                _check_value(value, _hints(ZoftConfig)[key], key, where)
        return dropped

    def _component(self, group: str, value: Any, where: str, replaced: bool) -> dict[str, str]:
        if value is None or value == "???":
            return {}
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {group} must be a mapping of its settings, got {value!r}; a {group} is chosen by "
                f"`{group}=NAME` on the command line or `- override /{group}: NAME` under `defaults:` in a file"
            )
        cls, dropped = self.chosen[group], self._of_other_choices(self.chosen[group].counts_with, group, value)
        for key in list(value):
            if key in _hints(cls):
                _check_value(value[key], _hints(cls)[key], f"{group}.{key}", where)
            # settings of the part that another file replaced belong to no part now
            elif replaced and any(key in _hints(other) for other in components(group).values()):
                del value[key]
                dropped[f"{group}.{key}"] = f"the {group} you chose has no such setting"
            else:
                raise UserError(_no_such_field(group, key, cls, where))
        return dropped

    def _of_other_choices(self, conditions: Conditions, group: str, value: dict[str, Any]) -> dict[str, str]:
        """Take out a file's settings that count with other values than the ones that arguments have put in place."""
        dropped = {}
        for name, (other, counting) in conditions.items():
            key = f"{group}.{other}"
            if name in value and counting and self.given.get(key, counting[0]) not in counting:
                del value[name]
                dropped[f"{group}.{name}"] = f"it does nothing with {key}={self.given[key]}"
        return dropped

    def _trainer(self, value: Any, where: str) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise UserError(f"{where}: trainer must be a mapping of TrainingArguments' fields, got {value!r}")
        dropped = self._of_other_choices(COUNTS_WITH, "trainer", value)
        for key, item in value.items():
            training_arguments.check(str(key), item, where)
        return dropped


def refuse_targets(data: Any, where: str) -> None:
    """Configs are data: a ``_target_`` names a callable, and nothing here ever calls one."""
    if isinstance(data, dict):
        if "_target_" in data:
            raise UserError(f"{where}: _target_ is refused: configs are data, and name components, never callables")
        for item in data.values():
            refuse_targets(item, where)
    elif isinstance(data, list):
        for item in data:
            refuse_targets(item, where)


def refuse_code(data: dict[str, Any], arguments: list[dict[str, Any]], where: str) -> None:
    """Refuse code that a config file names (a function, a metric's script): only the command line may name what is run.

    Args:
        data: a file's keys.
        arguments: those of the command line.
        where: the file.

    Raises:
        UserError: the file names one that the command line does not.
    """
    # what the command line names itself is trusted: a person has typed it
    known = {name for argument in arguments for name in _code(argument.get("objective"))}
    for key, name in _code(data.get("objective")):
        if (key, name) not in known:
            what = "a metric whose script is run" if key == "metric" else "a function to call"
            raise UserError(
                f"{where} names {what}, objective.{key}={name}: a config is data, so write it on the command line too "
                "if you trust it"
            )


def _code(data: Any, depth: int = 0) -> list[tuple[str, str]]:
    """(key, value) of keys called function, and of metrics that are scripts, at any depth, but for empty ones.

    A reference to another key counts where it could become either: in their place, or in that of ``settings`` (depth
    0) or of one objective's settings there (depth 1).
    """
    if not isinstance(data, dict):
        return []
    code = []
    for key, value in data.items():
        text = str(value)
        # ${...} may become anything once it is resolved, so it counts as code where code could stand
        refers = isinstance(value, str) and "${" in value and (depth == 1 or key in ("metric", "settings"))
        if (key == "function" and value) or (key == "metric" and text.startswith("evaluate:")) or refers:
            code.append((str(key), text))
        code += _code(value, depth + 1)
    return code


def _check_hydra(value: Any, where: str) -> None:
    if not isinstance(value, dict) or value.keys() - {"launcher"}:
        raise UserError(f"{where}: of hydra's settings only hydra.launcher can be set; the run's folder is output_dir")


_HINTS: dict[type, dict[str, Any]] = {}


def _hints(cls: type) -> dict[str, Any]:
    """The type of every field, evaluated once a class."""
    if cls not in _HINTS:
        hints = typing.get_type_hints(cls)
        _HINTS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _HINTS[cls]


def _near_root(key: str) -> str:
    """The key that was probably meant: also one a level down, for `eps` alone."""
    if key in ELSEWHERE:
        return f" Did you mean {ELSEWHERE[key]}?"
    roots = {*_hints(ZoftConfig), *ORDER}
    near = did_you_mean(key, roots)
    if near.startswith(" Did"):
        return near
    homes = [group for group in GROUPS if any(key in _hints(cls) for cls in components(group).values())]
    # a level down: groups of settings that are no components
    homes += [name for name in ("model", "budget", "tracker", "diagnostics") if key in _hints(_hints(ZoftConfig)[name])]
    if homes:
        return f" Did you mean {' or '.join(f'{home}.{key}' for home in homes[:3])}?"
    if key in training_arguments.fields():
        return f" Did you mean {training_arguments.HOMES.get(key, f'trainer.{key}')}?"
    return near


def _no_such_field(group: str, key: str, cls: type[Component], where: str) -> str:
    others = [name for name, other in components(group).items() if key in _hints(other)]
    message = f"{where}: {group}={cls.name()} has no {key!r}."
    if others:
        listed = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
        return f"{message} It belongs to {group}={listed}."
    return message + (did_you_mean(key, _hints(cls)) or " It has no settings.")


def _check_value(value: Any, hint: Any, key: str, where: str) -> None:
    """Refuse ``value`` unless OmegaConf could make it a ``hint``."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            for name, item in value.items():
                if name not in _hints(hint):
                    raise UserError(f"{where}: {key} has no {name!r}.{did_you_mean(name, _hints(hint))}")
                _check_value(item, _hints(hint)[name], f"{key}.{name}", where)
            return
        extra = f"; a preset is chosen by `- override /{key}: NAME`" if key in PRESET_GROUPS else ""
        raise UserError(f"{where}: {key} must be a mapping of its settings, got {value!r}{extra}")
    if not _fits(value, hint):
        hint_text = ""
        if isinstance(value, float) and value.is_integer() and int in (hint, *typing.get_args(hint)):
            hint_text = f": write {int(value)}"
        raise UserError(f"{where}: {key} must be {_words(hint)}, got {value!r}{hint_text}")


def _fits(value: Any, hint: Any) -> bool:
    # a value that is filled in later cannot be checked yet
    if hint is Any or (isinstance(value, str) and (value == "???" or "${" in value)):
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is type(None):
        return value is None
    if origin is list or hint is list:
        inner = (typing.get_args(hint) or (Any,))[0]
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return _fits_scalar(value, hint)


def _fits_scalar(value: Any, hint: Any) -> bool:
    # bool is an int in Python, and no number here
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint in (bool, str)
    if hint is float and isinstance(value, str):
        try:
            return bool(float(value)) or True
        except ValueError:
            return False
    if hint is int and isinstance(value, str):
        return value.lstrip("+-").isdigit()
    # OmegaConf would make text of a number, and a number of a whole one
    allowed = {int: (int,), float: (int, float), str: (str, int, float)}.get(hint)
    return allowed is None or isinstance(value, allowed)


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin is list or hint is list:
        return "a list, e.g. [a,b]"
    if origin is dict or hint is dict:
        return "a mapping, e.g. {a: b}"
    return WORDS.get(hint, str(getattr(hint, "__name__", hint)))


# ---- What Hydra and OmegaConf complain about, as one sentence of zoft's ----------------------------------------------

_PLUGINS = {"joblib": "hydra-joblib-launcher", "submitit": "hydra-submitit-launcher", "ray": "'zoft[ray]'"}


@contextmanager
def translated(experiments: Experiments | None = None) -> Iterator[None]:
    """Turn whatever Hydra, OmegaConf or YAML raise inside into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(yaml_message(error, mark.name if mark else "a config")) from error
    except MissingConfigException as error:
        raise UserError(_named(_missing(error), experiments)) from error
    # what these libraries raise for a user's mistake; anything else is ours, and keeps its traceback
    except (HydraException, OmegaConfBaseException, OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(_named(_sentence(error), experiments)) from error


def _missing(error: MissingConfigException) -> str:
    """A defaults list names what is not there."""
    path = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = path.rpartition("/")
    inside = re.match(r"In '([^']+)'", str(error))
    where = f"{inside.group(1)}: " if inside and inside.group(1) != "zoft_train" else ""
    if group == "hydra/launcher":
        package = next((package for key, package in _PLUGINS.items() if name.startswith(key)), "its Hydra plugin")
        return f"launcher={name} needs a package: pip install {package}"
    part = group.rpartition("/")[2]
    if "/" in group and part in ORDER:
        return f"{where}write `- override /{part}: {name}` under `defaults:` (with `override` and the slash)"
    return f"{where}there is no {group or 'config'} called {name!r}.{did_you_mean(name, error.options or [])}"


def _sentence(error: BaseException) -> str:
    """The innermost reason, without the technical tail (full_key, object_type) that OmegaConf appends."""
    reasons: list[str] = []
    link: BaseException | None = error
    while link is not None:
        lines = [line.strip() for line in str(link).splitlines() if line.strip()]
        key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
        sentences = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
        text = " ".join(sentences)
        # a reason that repeats an outer one says nothing new
        if text and not any(text in reason for reason in reasons):
            reasons.append(f"{text} (at {key})" if key else text)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "; ".join(reasons) or type(error).__name__


def _named(message: str, experiments: Experiments | None) -> str:
    """Registered names of experiments, back to the files they are."""
    for name, file in (experiments.files if experiments else {}).items():
        message = message.replace(f"config/{name}", file).replace(name, file)
    return message
