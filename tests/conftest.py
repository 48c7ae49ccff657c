"""What every test runs under: one thread a process, no hub, no trackers. Set before anything imports torch."""

import gc
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist has the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"
os.environ["MATPLOTLIBRC"] = str(Path(__file__).with_name("matplotlibrc"))
os.environ.pop("COLUMNS", None)  # pytest-xdist says 80; what is printed is laid out for a terminal where one is named

# Runs wait for the disk at every step and file, a third of a short training; a file system in memory does not wait.
_IN_MEMORY, _ROOM = Path("/dev/shm"), 4 << 30  # 1.6 GB are used
if os.access(_IN_MEMORY, os.W_OK) and shutil.disk_usage(_IN_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_IN_MEMORY))

gc.set_threshold(20_000, 10, 20)  # looking through what is young every 700 objects is a tenth of a short training


_frozen = [0]


def pytest_runtest_setup():
    """Where there is no GPU, `torch.manual_seed` keeps its seed for one, with a traceback: a millisecond each time."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "mtia") and not torch.cuda.is_available():
        for device in (torch.cuda, torch.mtia, torch.xpu):
            device._lazy_call = lambda *_, **__: None


def pytest_runtest_logfinish():
    """Take what imports made out of the garbage collector: the Trainer runs it in full before every training.

    Hundreds of thousands of objects of torch and transformers live as long as the process; looking them through took a
    third of a second each time, half of what a tiny training costs. What a test makes is collected as ever.
    """
    if len(sys.modules) > _frozen[0] + 20:
        _frozen[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def logs_as_they_were():
    """`zoft train` takes over zoft's log and import-linter disables every log there is; caplog needs them back.

    Before each test, too: a module's fixture that trains has done so by then.
    """
    _restore_logs()
    yield
    _restore_logs()


def _restore_logs():
    for log in _logs_of_zoft():
        log.propagate, log.handlers[:], log.disabled = True, [], False
        if log.level:  # setting it looks through every log that there is
            log.setLevel(logging.NOTSET)


def _logs_of_zoft():
    known = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict) if name.startswith("zoft.")]
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
