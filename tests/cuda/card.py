"""The device of the tests marked cuda: a card, or the CPU where `gpu_check.py --rehearse` tries the tests."""

from __future__ import annotations

import os

import pytest
import torch


def device() -> torch.device:
    """The first card; a test that needs one is skipped where there is none."""
    chosen = torch.device(os.environ.get("ZOFT_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU here: `make gpu-check` runs this where there is one")
    return chosen


def on(chosen: torch.device) -> list[str]:
    """What a run needs to be told to stay on this device."""
    return ["trainer.use_cpu=true"] if chosen.type == "cpu" else []
