"""Processes that torchrun has started anew (--max-restarts) meet where those before them have left no addresses."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

from torch import distributed

log = logging.getLogger(__name__)


def meeting(seconds: float) -> dict[str, Any]:
    """Arguments of ``PartialState`` (and of ``init_process_group``) for processes that torchrun has started.

    torchrun keeps one store for all attempts, and in it the addresses of processes that have died: those of the next
    attempt read them and do not find each other. On one machine all know which attempt this is, and meet under its
    number. On several machines they need not count alike: torchrun has to make a store for each attempt there.

    Args:
        seconds: how long to wait for the others.

    Returns:
        Nothing but the time to wait in a first attempt, or where torchrun makes a store for each.
    """
    wait, env = timedelta(seconds=seconds), os.environ
    is_shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_shared and env.get("GROUP_WORLD_SIZE", "1") != "1" and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        log.warning(
            "torchrun --max-restarts on several machines finds addresses of dead processes after a restart: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in front of torchrun, on each of them"
        )
        return {"timeout": wait}
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or not is_shared:
        return {"timeout": wait}
    host, port, world = env["MASTER_ADDR"], int(env["MASTER_PORT"]), int(env["WORLD_SIZE"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, world, is_master=False, timeout=wait
    )
    prefixed = distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    return {"timeout": wait, "store": prefixed, "rank": int(env["RANK"]), "world_size": world}
