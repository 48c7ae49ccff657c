"""No tensor is made on a device other than its weights': two walks, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("file", ["walk_devices.py", pytest.param("walk_objectives.py", marks=pytest.mark.slow)])
def test_the_walk_over_cards_that_are_not_there(file):
    """It registers a device type, which stays for the whole process and which other tests would meet."""
    walk = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    done = subprocess.run(walk, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
