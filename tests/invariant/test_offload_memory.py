"""A model three times larger than the memory that a run is allowed beside the process itself, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny_llama

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("trained", ["all", "norms"])
def test_a_model_three_times_larger_than_what_is_allowed(tmp_path, trained):
    """Trained blocks rest in a scratch file, frozen ones in the checkpoint's own: neither is ever in memory whole."""
    tiny_llama().save_pretrained(tmp_path / "small")
    tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=32).save_pretrained(tmp_path / "large")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.invariant.offload_memory", str(tmp_path), trained]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["model"] > 120
    assert sizes["peak"] < sizes["model"] / 3, sizes
    assert sizes["blocks"] < sizes["model"] / 15, sizes
