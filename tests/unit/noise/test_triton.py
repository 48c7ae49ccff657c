"""The GPU's noise without a GPU: its bits, its machine code, and what is said where there is no Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoft.noise import kernels
from zoft.noise.kernels import choice
from zoft.noise.source import prepare


@pytest.mark.parametrize(("file", "interpret"), [("triton_bits.py", "1"), ("triton_cards.py", "0")])
def test_without_a_card(file, interpret):
    """Each in a process of its own: whether Triton interprets is decided when it is first imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here: `make test-triton` runs this in an environment that has it")
    where = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(where)]
    env = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        command, cwd=where.parents[3], env=env, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_no_triton_is_said_once_and_the_noise_is_eager(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "zoft.noise.kernels.noise_triton", None)
    for name, value in (("ACTIVE", {}), ("_why", {}), ("_broken", set())):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.setenv("ZOFT_COMPILE", "auto")
    card = torch.device("cuda")
    assert prepare(choice.WORTH_BUILDING["cuda"] - 1, card) == "eager"
    assert "fewer than pay" in kernels.why(card)
    assert not caplog.records
    assert [prepare(choice.WORTH_BUILDING["cuda"], card) for _ in range(2)] == ["eager", "eager"]
    (record,) = caplog.records
    assert "the noise on cuda is not compiled, training is slower by some of it: triton" in record.message
    assert "pip install triton" in record.message
    assert "pip install triton" in kernels.why(card)
