"""Arguments of the command line: Hydra's grammar, checked, and rewritten to zoft's precedence."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from zoft.component import GROUPS
from zoft.config import own
from zoft.config.catalog import ORDER, choices
from zoft.config.check import refuse_targets
from zoft.config.experiments import Experiments
from zoft.errors import UserError, did_you_mean
from zoft.utils import own_files

METHOD_SLOT = "method@_global_"
"""The second place for a method in train.yaml's defaults list, after the experiment's."""

_SWEEP_ONLY = ("hydra/launcher", "hydra.launcher")


def parse(parser: OverridesParser, text: str) -> Override:
    """One argument.

    Raises:
        UserError: it is not ``key=value`` in Hydra's grammar.
    """
    if "=" not in text and not text.startswith("~"):
        _refuse_folder(text)
        hint = f" Did you mean config={text}?" if re.fullmatch(r"[\w./-]+", text) and not text.startswith("-") else ""
        raise UserError(f"{text!r} is not an argument: write key=value or group=choice.{hint}")
    try:
        return parser.parse_overrides([quoted(parser, text)])[0]
    except (HydraException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot read the argument {text!r} ({reason}): write key=value; quote a value with spaces, commas, braces "
            "or other signs twice, as in 'key=\"a, b\"'"
        ) from error


def _refuse_folder(text: str) -> None:
    if Path(text).is_dir():
        meant = f"config={text}/config.yaml" if (Path(text) / "config.yaml").is_file() else f"model.name={text}"
        raise UserError(f"{text!r} is a folder, not an argument: write key=value, e.g. {meant}")


def quoted(parser: OverridesParser, text: str) -> str:
    """The argument with quotes round a value that Hydra's grammar would stumble over without any doubt of what it is.

    A sweep's folders are called ``seed=1,task=sst2``; their paths must work as they are.
    """
    key, _, value = text.partition("=")
    if not (key == "config" and Path(value).is_file()):
        if re.search(r"""['"{}()\[\]\\]|^$""", value):
            return text
        with suppress(HydraException, ValueError):
            parser.parse_overrides([text])
            return text
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


def with_adapter(overrides: list[str]) -> list[str]:
    """Whoever chooses an adapter trains it, unless another argument says what is trained.

    Example:
        >>> with_adapter(["config=quickstart", "peft=lora"])
        ['config=quickstart', 'peft=lora', 'trainable=adapter']
    """
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("peft=")]
    says_what = any(re.match(r"[+~]*trainable\b", text) for text in overrides)
    one_adapter = chosen and chosen[-1] in choices("peft", plugins=False) and chosen[-1] != "none"
    return [*overrides, "trainable=adapter"] if one_adapter and not says_what else overrides


def is_value(override: Override) -> bool:
    """Whether it sets keys, rather than choosing a member of a group or deleting."""
    if override.is_delete() or override.is_sweep_override() or is_hydra(override):
        return False
    return override.key_or_group not in ORDER or isinstance(override.value(), dict)


def is_hydra(override: Override) -> bool:
    """Whether it addresses Hydra itself."""
    return bool(re.match(r"hydra(?:$|[./@])", override.key_or_group))


def nested(override: Override) -> dict[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``."""
    value: Any = override.value()
    for part in reversed([part for part in re.split(r"[.\[\]]+", override.key_or_group) if part]):
        value = {part: value}
    return dict(value)


def rewrite(parsed: list[Override], experiments: Experiments, *, sweeping: bool = False) -> list[str]:
    """Arguments as Hydra must read them to do what the user meant.

    Args:
        parsed: the arguments.
        experiments: registers what ``config=`` names.
        sweeping: part of a sweep, where launchers mean something.

    Raises:
        UserError: a choice that does not exist, an argument that means nothing here.
    """
    rewritten: list[str] = []
    for override in parsed:
        text = override.input_line or ""
        if override.is_sweep_override():
            refuse_targets(dict.fromkeys(override.key_or_group.split(".")), text)
            raise UserError(
                f"{text} has several values: add -m to run one training for each, "
                f"or write {override.key_or_group}=[...] for a list"
            )
        refuse_targets(nested(override), text)
        if override.package is not None:
            raise UserError(f"{text}: groups have one place each here: drop the part after '@'")
        if is_hydra(override):
            rewritten.append(_hydra_argument(override, text, sweeping))
        elif override.key_or_group == "launcher" and not sweeping:
            raise UserError(f"{text}: a launcher runs the cells of a sweep: add -m, or drop it")
        elif override.key_or_group in ORDER and not isinstance(_value(override), dict):
            rewritten += _choice(override, experiments)
        else:
            rewritten.append(_key_argument(override, text))
    return rewritten


def _value(override: Override) -> Any:
    return None if override.is_delete() and override.value_type is None else override.value()


def _hydra_argument(override: Override, text: str, sweeping: bool) -> str:
    if not sweeping or not override.key_or_group.startswith(_SWEEP_ONLY):
        raise UserError(
            f"{text}: zoft keeps Hydra's own settings to itself; only hydra.launcher.* (in a sweep, -m) can be set. "
            "The run's folder is output_dir"
        )
    return text


def _choice(override: Override, experiments: Experiments) -> list[str]:
    """``group=choice``: checked, and the experiment or method put in its place."""
    group, value, text = override.key_or_group, _value(override), override.input_line or ""
    if override.is_delete() or value is None:
        if group in ("config", "method"):
            return ["~method"] if group == "method" else []
        raise UserError(f"{text}: {group} cannot be left out: choose one of {', '.join(choices(group))}")
    if not isinstance(value, str):
        value = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(value, str):
        raise UserError(f"{text}: {group} takes a name, e.g. {group}={choices(group)[0]}")
    if group == "config":
        return [f"config={experiments.register(value)}"]
    if group in GROUPS and own_files.split(value):
        return [f"{group}={own.register(group, value)}"]
    known = choices(group)
    if value not in known:
        homes = [f"{other}={value}" for other in ORDER if value in choices(other)]  # `optimizer=lozo`: a method's name
        _refuse_folder(text)
        hint = f" Did you mean {' or '.join(homes)}?" if homes else did_you_mean(value, known)
        if group == "model" and "/" in value:
            hint = f" One of the hub or a folder is model.name={value}."
        raise UserError(f"there is no {group} called {value!r}.{hint}")
    # An argument's method comes after the experiment: it takes the second slot, and empties the first.
    return ["~method", f"{METHOD_SLOT}={value}"] if group == "method" else [f"{group}={value}"]


def _key_argument(override: Override, text: str) -> str:
    """``key=value``; ``+`` is never needed, and ``trainer.`` is an open mapping."""
    root = override.key_or_group.split(".")[0]
    if override.is_delete():
        raise UserError(f"{text}: keys cannot be taken away; set it to the value you want")
    if "/" in override.key_or_group:
        near = did_you_mean(override.key_or_group, ORDER)
        raise UserError(f"{text}: there is no group {override.key_or_group!r}.{near}")
    bare = text.lstrip("+")
    return f"++{bare}" if root == "trainer" or "." in override.key_or_group else bare
