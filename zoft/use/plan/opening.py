"""The line that a run, a search and a bench begin with: what memory it takes, before its weights are loaded."""

from __future__ import annotations

import logging
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.use.plan.estimate import RunEstimate


def brief(estimate: RunEstimate) -> str:
    """The estimate in one line, for the beginning of a run."""
    from zoft.report.text import gib

    line = f"memory  about {gib(estimate.method.total_mb)} on {estimate.device} by estimate"
    if estimate.adamw.parts:
        lora, adamw = gib(estimate.lora.total_mb), gib(estimate.adamw.total_mb)
        line += f"; by backpropagation LoRA {lora}, AdamW on all weights {adamw}"
    if estimate.free_mb is None or estimate.method.total_mb - estimate.method.host_mb <= estimate.free_mb:
        return line
    return f"{line}; {gib(estimate.free_mb)} ARE FREE: take a smaller batch, or fewer tokens"


def of_run(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> list[str]:
    """The line of a run whose rows are encoded and whose weights are not loaded; none where it cannot be told."""
    from zoft.use.plan.estimate import of_rows

    try:
        return [brief(of_rows(cfg, rows))]
    except Exception as error:  # what a run cannot do it says itself, and better
        logging.getLogger(__name__).debug("no estimate: %s", error)
        return []
