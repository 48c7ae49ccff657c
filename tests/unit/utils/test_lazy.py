"""Names of torch that cost nothing until they are used."""

from __future__ import annotations

import subprocess
import sys

import torch

from zoft.utils import lazy


def test_names_are_torchs_own():
    assert lazy.nn.Linear is torch.nn.Linear
    assert lazy.torch.float32 is torch.float32
    assert isinstance(torch.zeros(1), lazy.Tensor)
    assert isinstance(torch.nn.Parameter(torch.zeros(1)), lazy.Tensor)
    assert not isinstance(1.0, lazy.Tensor)


def test_importing_them_does_not_import_torch():
    code = (
        "import sys; from zoft.utils.lazy import Tensor, nn, torch; import zoft.engines.base, zoft.subspaces.full; "
        "assert 'torch' not in sys.modules; nn.Linear; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
