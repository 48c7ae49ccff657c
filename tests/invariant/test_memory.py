"""Queries cost the memory of inference: measured, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = ["layerwise", "in_place:restore=subtract", "side_path"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """MiB above the resident weights, by engine and q; full parameters, 2,048 tokens."""
    # what is freed goes back to the system at once, and is not counted for the next one
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.invariant.memory_of", *ENGINES]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("q", [1, 16])
def test_in_place_needs_what_a_bare_forward_needs(peaks, q):
    assert peaks[f"in_place:restore=subtract q={q}"] <= 1.05 * max(peaks["bare q=1"], peaks["bare q=16"])


@pytest.mark.parametrize("q", [1, 16])
@pytest.mark.parametrize("engine", ["layerwise", "side_path"])
def test_layerwise_needs_two_of_the_largest_scratch_besides(peaks, engine, q):
    bare = max(peaks["bare q=1"], peaks["bare q=16"])
    assert peaks[f"{engine} q={q}"] <= 1.02 * bare + 2 * peaks["scratch"]


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_flat_in_q(peaks, engine):
    assert peaks[f"{engine} q=16"] <= peaks[f"{engine} q=1"] + 0.05 * peaks["bare q=1"]


def test_the_measurement_sees_a_copy_of_the_weights(peaks):
    assert peaks["bare q=1"] > 20  # the activations of 2,048 tokens, so that 5 % is more than the noise of the system
