"""What every test runs under: one thread a process, no hub, no trackers. Set before anything imports torch."""

import logging
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist has the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def logs_as_they_were():
    """`zoft train` takes over zoft's log and import-linter disables every log there is; caplog needs them back."""
    kept = {log: (log.propagate, log.level, log.handlers[:], log.disabled) for log in _logs_of_zoft()}
    yield
    for log in _logs_of_zoft():
        log.propagate, level, log.handlers[:], log.disabled = kept.get(log, (True, logging.NOTSET, [], False))
        log.setLevel(level)


def _logs_of_zoft():
    known = [
        logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict) if name.split(".")[0] == "zoft"
    ]
    return [logging.getLogger("zoft"), *known]


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    """No test, and nothing that it calls, leaves torch's modes switched for the next one."""
    yield
    if "torch" in sys.modules:
        import torch

        left = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._len_torch_function_stack())
        torch.set_grad_enabled(True)
        assert left == (True, False, 0), "gradients enabled, inference mode, overriding contexts"
