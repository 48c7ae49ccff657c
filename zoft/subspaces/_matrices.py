"""Matrices that are the same bits everywhere: orthonormal bases from a key, and products of blocks."""

from __future__ import annotations

from contextlib import ExitStack

from zoft.noise.counter import sample
from zoft.utils.lazy import Tensor, torch


def haar(key: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """A matrix with orthonormal columns, uniformly distributed: float32 [rows, columns].

    Q of a Gaussian matrix's QR with each column's sign that of R's diagonal; without that Q is not uniform. It is
    computed in float64 on the CPU, so that every device has the same.

    Args:
        key: of the stream of numbers.
        rows: at least ``columns``.
        columns: how many.
        device: where the result is wanted.

    References: Mezzadri 2007 (How to generate random matrices from the classical compact groups).
    """
    # float64 on the CPU: QR differs between devices, and a direction must not
    gaussian = sample("gaussian", key, 0, rows * columns, torch.device("cpu")).view(rows, columns).double()
    q, r = torch.linalg.qr(gaussian)
    # Q's columns are unique up to sign only; R with a positive diagonal makes them Haar (Mezzadri 2007)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).to(torch.float32).contiguous().to(device)


def rows_of(given: Tensor, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of a matrix, with zeros where there are none: the others' products do not change."""
    if first >= 0 and first + count <= len(given):
        return given[first : first + count]
    rows = given.new_zeros(count, given.shape[1])
    start, stop = max(0, first), min(len(given), first + count)
    rows[start - first : stop - first] = given[start:stop]
    return rows


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] times right [k, n] in float32: the same bits for the same numbers, wherever they lie in memory."""
    with ExitStack() as stack:
        # under autocast the product would be bfloat16, and depend on the caller
        if torch.is_autocast_enabled(left.device.type):  # the model's own forward may be on
            stack.enter_context(torch.autocast(left.device.type, enabled=False))
        return _aligned(left) @ _aligned(right)


def _aligned(matrix: Tensor) -> Tensor:
    """Kernels are chosen by the place of the first element, too."""
    return matrix if matrix.data_ptr() % 64 == 0 else matrix.clone()
