"""The Hugging Face hub where it cannot be reached: one question of seconds, not the client's minutes of retries."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoft.errors import UserError

_SECONDS = 5.0
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def switched_off() -> str:
    """The environment variable that switches the hub off; empty where none does."""
    on = ("1", "ON", "YES", "TRUE")  # as the client reads them
    return next((name for name in _SWITCHES if os.environ.get(name, "").upper() in on), "")


def out_of_reach() -> str:
    """Why the hub does not answer, in words; empty where it does. It is asked once in a process, for 5 s at most."""
    return f"{name} is set" if (name := switched_off()) else _unanswered()


@functools.lru_cache(1)
def _unanswered() -> str:
    from huggingface_hub import constants, get_session

    try:
        # any answer will do; proxies and certificates are the client's own
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of whichever HTTP library the client has
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return f"{constants.ENDPOINT} cannot be reached ({reason})"
    return ""


def not_here(what: str, instead: str) -> UserError:
    """That neither the hub, which is out of reach, nor its cache can serve a name."""
    unset = f"unset {name_of_switch}, or " if (name_of_switch := switched_off()) else ""
    return UserError(f"{what} is not on this machine, and {out_of_reach()}: {unset}give {instead}")


@contextmanager
def not_waited_for() -> Iterator[None]:
    """Inside, the client takes what it has cached, and asks nothing of a hub that cannot be reached."""
    if switched_off() or not out_of_reach():
        yield
        return
    import huggingface_hub

    # datasets has copied the switch, and evaluate has one of its own
    copies = {"datasets.config": "HF_HUB_OFFLINE", "evaluate.config": "HF_EVALUATE_OFFLINE"}
    holders: list[Any] = [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    holders += [(sys.modules[name], switch) for name, switch in copies.items() if name in sys.modules]
    before = [getattr(holder, switch) for holder, switch in holders]
    try:
        for holder, switch in holders:
            setattr(holder, switch, True)
        yield
    finally:
        for (holder, switch), value in zip(holders, before, strict=True):
            setattr(holder, switch, value)


def has_cached(model: str) -> bool:
    """Whether the client's cache has anything of a model."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())
