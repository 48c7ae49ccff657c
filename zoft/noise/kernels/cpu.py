"""The CPU's kernels: noise.cpp, built once a machine by the C++ compiler that is there and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zoft.noise.kernels.base import Kernels, Stream
from zoft.utils.files import cache_dir, write_atomically
from zoft.utils.lazy import Tensor, torch

SOURCE = Path(__file__).with_name("noise.cpp")

# -ffp-contract=off: the bits (see noise.cpp). -fno-trapping-math: a select may compute both of its sides.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")
# Not -march=native: a home folder is shared by machines that differ, and the flags are part of the library's name.
_AVX2 = ("-mavx2", "-mfma", "-mbmi2", "-mf16c")
_INSTRUCTIONS = {"AVX2": _AVX2, "AVX512": (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw")}
_THREADING = ("-fopenmp", "-fopenmp-simd")  # the second where there is no OpenMP to link: one thread
_PARALLEL_FROM = 1 << 15  # elements: about 30 us of work, several times what waking the other threads takes


class _CStream(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("table", ctypes.c_void_p),
        ("factor", ctypes.c_float),
    )


class CpuKernels(Kernels):
    """noise.cpp as a library of functions on pointers; shapes and dtypes are checked here, where they are known."""

    def __init__(self, library: ctypes.CDLL, about: str) -> None:
        self.about = about
        self.dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # zoft_perturb's numbers for them
        self._library = library
        stream, number, pointer, threads = ctypes.POINTER(_CStream), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        library.zoft_words.argtypes = library.zoft_draw.argtypes = [stream, number, number, threads, pointer]
        library.zoft_add.argtypes = [stream, number, number, threads, ctypes.c_float, pointer]
        dtype, num, scales, outs = ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_double), ctypes.POINTER(pointer)
        library.zoft_perturb.argtypes = [stream, number, number, threads, dtype, pointer, num, scales, outs]
        library.zoft_gather.argtypes = [stream, number, threads, pointer, pointer]
        library.zoft_squared_norm.argtypes = [stream, number, number, threads]
        library.zoft_squared_norm.restype = ctypes.c_int64
        library.zoft_add_product.argtypes = [number, number, *[threads] * 2, pointer, pointer, ctypes.c_float, pointer]
        for name in ("words", "draw", "add", "perturb", "gather", "add_product"):
            getattr(library, f"zoft_{name}").restype = None

    def words(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        count = out.numel()
        self._library.zoft_words(_native(stream), offset, count, _threads(count), _written(out, torch.int32))

    def draw(self, stream: Stream, offset: int, out: Tensor) -> None:
        """See :class:`Kernels`."""
        count = out.numel()
        self._library.zoft_draw(_native(stream), offset, count, _threads(count), _written(out, torch.float32))

    def add_(self, stream: Stream, offset: int, out: Tensor, scale: float) -> None:
        """See :class:`Kernels`."""
        count = out.numel()
        self._library.zoft_add(_native(stream), offset, count, _threads(count), scale, _written(out, torch.float32))

    def perturb(
        self, stream: Stream, offset: int, weight: Tensor, scales: Sequence[float], outs: Sequence[Tensor]
    ) -> None:
        """See :class:`Kernels`."""
        count, num = weight.numel(), len(outs)
        assert [out.numel() for out in outs] == [count] * len(scales)
        dtype, stored = self.dtypes.index(weight.dtype), weight.dtype
        pointers = (ctypes.c_void_p * num)(*(_written(out, stored) for out in outs))
        what = _read(weight, stored), num, (ctypes.c_double * num)(*scales), pointers
        self._library.zoft_perturb(_native(stream), offset, count, _threads(count), dtype, *what)

    def add_product(self, left: Tensor, right: Tensor, out: Tensor, scale: float) -> bool:
        """See :class:`Kernels`."""
        (rows, rank), columns = left.shape, right.shape[1]
        assert out.numel() == rows * columns
        factors = _read(left, torch.float32), _read(right, torch.float32)
        threads = _threads(out.numel())
        self._library.zoft_add_product(rows, columns, rank, threads, *factors, scale, _written(out, torch.float32))
        return True

    def gather(self, stream: Stream, indices: Tensor, out: Tensor) -> None:
        """See :class:`Kernels`."""
        count = indices.numel()
        assert out.numel() == count
        pointers = _read(indices, torch.int64), _written(out, torch.float32)
        self._library.zoft_gather(_native(stream), count, _threads(count), *pointers)

    def squared_norm(self, stream: Stream, offset: int, count: int) -> int:
        """See :class:`Kernels`."""
        assert count <= 1 << 26
        return int(self._library.zoft_squared_norm(_native(stream), offset, count, _threads(count)))


def compiler() -> list[str] | None:
    """The C++ compiler as the beginning of a command line: $CXX, else the platform's own; None where there is none."""
    for command in (os.environ.get("CXX", ""), "clang++" if sys.platform == "darwin" else "g++", "c++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def library() -> Path:
    """Where the library for this source, these flags and this kind of processor is kept, built or not."""
    parts = (*_FLAGS, *_instructions(), sys.platform, platform.machine())
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(parts).encode()).hexdigest()[:16]
    return cache_dir() / "compiled" / f"noise-{digest}.so"


def load() -> CpuKernels:
    """The kernels; built first where they are not in the cache.

    Raises:
        RuntimeError: no compiler, or what it says.
        OSError: the library cannot be loaded.
    """
    path = library()
    about = _processor()
    if path.exists():
        try:
            return CpuKernels(ctypes.CDLL(str(path)), about)
        except (OSError, AttributeError):
            pass  # half of another system's cache: build it again
    with tempfile.TemporaryDirectory(prefix="zoft-", ignore_cleanup_errors=True) as folder:
        built = _build(Path(folder) / path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, built.read_bytes())  # several processes may do this at once
            built = path
        except OSError:
            pass  # a cache that cannot be written costs this build in every process, no more
        return CpuKernels(ctypes.CDLL(str(built)), about)


def _build(path: Path) -> Path:
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler: install g++, or set CXX")
    reason = ""
    for threading in _THREADING:
        line = [*command, *_FLAGS, *_instructions(), threading, str(SOURCE), "-o", str(path)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            return path
        reason = reason or next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
    raise RuntimeError(f"{shlex.join(command)} failed: {reason}")


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{' '.join(compiler() or ['built before'])}, {capability}"


def _instructions() -> tuple[str, ...]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()) if x86 else ()


def _threads(count: int) -> int:
    return torch.get_num_threads() if count >= _PARALLEL_FROM else 1


def _native(stream: Stream) -> _CStream:
    table = None if stream.table is None else _read(stream.table, torch.float32)
    return _CStream(stream.low & 0xFFFFFFFF, stream.high & 0xFFFFFFFF, table, stream.factor)


def _read(tensor: Tensor, dtype: torch.dtype) -> int:
    assert tensor.device.type == "cpu", tensor.device
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.is_contiguous(), tensor.stride()
    return int(tensor.data_ptr())


def _written(tensor: Tensor, dtype: torch.dtype) -> int:
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)  # autograd learns of the write, as of any other in place
    return _read(tensor, dtype)
