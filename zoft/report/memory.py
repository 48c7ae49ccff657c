"""The peak memory of a run."""

from __future__ import annotations

import sys

from zoft.utils.lazy import torch

_MB = 2**20
_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"


class PeakMemory:
    """The most memory used since the last `reset`, in MiB.

    On a CUDA device what torch's allocator has handed out there; otherwise the resident memory of this process, the
    interpreter and its libraries included (several hundred MiB with torch). The kernel itself keeps the peak
    (VmHWM), so nothing is sampled and nothing is missed.

    Args:
        device: where the model is; `cuda:1` counts that device only.

    Example:
        >>> memory = PeakMemory("cpu")
        >>> memory.reset()
        >>> memory.peak_mb() > 0
        True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = str(device)
        self.base_mb = 0.0
        """What the process held before a model was loaded: the interpreter and its libraries; 0 beside a device."""
        self.resettable = True
        """Whether `reset` works here; where it does not (macOS, some containers) the peak is the whole process's."""

    def reset(self) -> None:
        """Begin a new measurement."""
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            with open(_CLEAR, "w") as file:
                file.write("5")  # proc(5): resets the peak resident set size to the current one
        except OSError:
            self.resettable = False

    def peak_mb(self) -> float:
        """The most since `reset`, MiB."""
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self.device) / _MB
        peak = _status_mb("VmHWM")
        return _rusage_mb() if peak is None else peak

    def current_mb(self) -> float:
        """In use now, MiB; the process's peak where the system does not say."""
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.memory_allocated(self.device) / _MB
        now = _status_mb("VmRSS")
        return _rusage_mb() if now is None else now


def _status_mb(field: str) -> float | None:
    try:
        with open(_STATUS) as file:
            for line in file:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) / 1024  # the kernel writes kB and means KiB
    except OSError:
        pass
    return None


def _rusage_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MB if sys.platform == "darwin" else 1024)  # bytes on macOS, KiB elsewhere
