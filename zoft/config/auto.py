"""`optimizer.learning_rate=auto` in arguments and files: the word is taken out, and kept in the list `auto`."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, open_dict

from zoft.config.schema import AUTO

_WORD = re.compile(r"\+*(?P<key>[\w.]+)=(?P<quote>['\"]?)auto(?P=quote)")


def split(overrides: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(the other arguments, keys that are set to auto, keys that are set to something else), of those in ``AUTO``.

    Example:
        >>> split(["config=mine", "optimizer.learning_rate=auto", "estimator.eps=0.1"])
        (['config=mine', 'estimator.eps=0.1'], ['optimizer.learning_rate'], ['estimator.eps'])
    """
    others, chosen, given = [], [], []
    for override in overrides:
        match, key = _WORD.fullmatch(override), override.lstrip("+").partition("=")[0]
        if match and match["key"] in AUTO:
            chosen.append(match["key"])
        else:
            others.append(override)
            given += [key] * (key in AUTO)
    return others, chosen, given


def take_out(content: DictConfig) -> None:
    """Keys of a file that are ``auto``, moved into its list ``auto``.

    Args:
        content: of the file; changed in place.
    """
    for key in AUTO:
        group, name = key.split(".")
        part: Any = content.get(group)
        if isinstance(part, DictConfig) and part.get(name) == "auto":
            with open_dict(content):
                del part[name]
                listed = content.get("auto", [])
                content.auto = [*(listed if isinstance(listed, list | ListConfig) else []), key]


def settled(cfg: DictConfig, chosen: list[str], given: list[str]) -> None:
    """The list as files and arguments have it together: an argument's number takes the place of a file's ``auto``."""
    listed = [key for key in [*cfg.auto, *chosen] if key not in given or key in chosen]
    cfg.auto = list(dict.fromkeys(listed))
