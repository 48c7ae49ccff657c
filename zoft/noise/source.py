"""The sources of random directions: z is a function of run seed, step, direction index and tensor name alone.

The default source is a counter (zoft/noise/counter.py): a 64-bit key names the stream, the same bits come out on every
device, in any order, for any slice; the global generators are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from zoft.noise import counter, kernels
from zoft.noise.counter import random_words, sample, squared_norm
from zoft.noise.direction import Direction, key_of
from zoft.utils.lazy import Tensor, torch

LAWS = (*counter.LAWS, "sphere")
"""Laws of one direction; each has mean 0 and E||z||^2 = number of elements."""

SOURCES = ("counter", "torch_sequential")
"""``counter``: this module's generator. ``torch_sequential``: MeZO's own stream, for number-for-number comparison."""


class NoiseSource:
    """The source of directions: :meth:`draw` materialises z; gather, add_ and perturb fuse drawing with use."""

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, flat; the caller may overwrite them."""
        raise NotImplementedError

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices.

        Args:
            direction: which z.
            name: which tensor of it.
            indices: int64, any shape.

        Returns:
            The elements that :meth:`draw` gives, in its dtype (float32 but for MeZO's own stream, which has the
            tensor's), of the shape and on the device of ``indices``.
        """
        raise NotImplementedError

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z[start : start + out.numel()]``: the bits of ``out.add_(draw(...).mul_(scale))``.

        Args:
            out: float32, flat and contiguous.
            direction: which z.
            name: which tensor of it.
            start: flat index, in the tensor, of the first element of ``out``.
            scale: what z is multiplied with, in float32.
        """
        # out <- out + s z
        z = self.draw(direction, name, start, start + out.numel(), out.device, out.dtype)
        out.add_(z.mul_(scale))

    def perturb(
        self,
        weight: Tensor,
        direction: Direction,
        name: str,
        start: int,
        scales: Sequence[float],
        outs: Sequence[Tensor],
    ) -> None:
        """``outs[i] = weight + scales[i] * z`` with z made once: the bits of :func:`zoft.weights.tensors.perturbed`.

        Args:
            weight: flat and contiguous, float32, bfloat16, float16 or float64.
            direction: which z.
            name: which tensor of it.
            start: flat index, in the tensor, of the first element of ``weight``.
            scales: one multiple of z for each of ``outs``.
            outs: like ``weight``; a single one may be ``weight`` itself.
        """
        # outs[i] <- W + s_i z, through the arithmetic that every engine shares
        z = self.draw(direction, name, start, start + weight.numel(), weight.device, weight.dtype)
        counter.perturb_with(z, weight, scales, outs)


@dataclass
class CounterNoise(NoiseSource):
    """z by counter: the default source.

    Args:
        law: one of :data:`LAWS`; ``sphere`` is a Gaussian scaled over all tensors.
        shapes: name -> number of elements of every trainable tensor (``sphere`` scales by the norm over all of them).
    """

    law: str
    shapes: dict[str, int]
    _scales: dict[Direction, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, float32 whatever the weights' ``dtype``, flat."""
        del dtype  # noise is always drawn in float32: low-precision noise would depend on the dtype
        z = sample(self._bits, key_of(direction, name), start, stop, device)
        return z.mul_(self._factor(direction, device)) if self.law == "sphere" else z

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices, and no others: float32, of the shape and device of ``indices``."""
        # a tensor that is not in ``shapes``: the largest index is asked for, which makes a GPU wait
        count = self.shapes.get(name) or (int(indices.max()) + 1 if indices.numel() else 0)
        factor = self._factor(direction, indices.device)
        return counter.gather(self._bits, key_of(direction, name), indices, count, factor)

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z[start : start + out.numel()]``, nothing of its size in between (see the base class)."""
        counter.add_(out, self._bits, key_of(direction, name), start, scale, self._factor(direction, out.device))

    def perturb(
        self,
        weight: Tensor,
        direction: Direction,
        name: str,
        start: int,
        scales: Sequence[float],
        outs: Sequence[Tensor],
    ) -> None:
        """``outs[i] = weight + scales[i] * z``, nothing of its size in between (see the base class)."""
        factor = self._factor(direction, weight.device)
        counter.perturb(weight, self._bits, key_of(direction, name), start, scales, outs, factor)

    @property
    def _bits(self) -> str:
        """The law that makes numbers of bits."""
        return "gaussian" if self.law == "sphere" else self.law

    def _factor(self, direction: Direction, device: torch.device) -> float:
        if self.law != "sphere":
            return 1.0
        # sqrt(d) / ||z||: the sum of squares is exact integer arithmetic, so every device finds the same scale
        scales = of_step(self._scales, direction)
        if direction not in scales:
            total = sum(squared_norm(key_of(direction, name), n, device) for name, n in self.shapes.items())
            # sqrt(d) / ||z||, with ||z||^2 in units of 2^-32
            scales[direction] = (sum(self.shapes.values()) * counter.FIXED_POINT**2 / total) ** 0.5
        return scales[direction]


def prepare(num_elements: int, device: torch.device) -> str:
    """Compile the noise of a device where that pays; to be called once, before a run's first step.

    The environment variable ZOFT_COMPILE decides otherwise: ``always``, ``never``, or ``auto``. A compiler that is not
    there or fails is a warning, never an error.

    Args:
        num_elements: how many weights are trained.
        device: where they are.

    Returns:
        ``compiled`` or ``eager``: how z is made there from now on; its bits are the same.

    Raises:
        UserError: ZOFT_COMPILE is none of the three.

    Example:
        >>> import torch
        >>> prepare(1000, torch.device("meta"))
        'eager'
    """
    return kernels.prepare(
        num_elements, device, lambda compiled: agrees(compiled, device, thorough=device.type == "cpu")
    )


def agrees(compiled: kernels.Kernels, device: torch.device, *, thorough: bool = True) -> bool:
    """Whether compiled kernels give the bits of the eager code on a few thousand elements.

    Args:
        compiled: what to compare with the eager code.
        device: where.
        thorough: every law, operation and dtype; else what most runs use, as Triton compiles each for a second.
    """
    with kernels.using(device, compiled):
        of_kernels = _specimens(device, thorough)
    with kernels.using(device, None):
        # bit by bit: a kernel that is off in the last place would change a run by whether a compiler is there
        return all(torch.equal(a, b) for a, b in zip(of_kernels, _specimens(device, thorough), strict=True))


def _specimens(device: torch.device, thorough: bool) -> list[Tensor]:
    size, direction, specimens = 4990, Direction(2, 3, 5), []
    for law in LAWS if thorough else counter.LAWS:
        source = CounterNoise(law, {"w": size + 9})
        total = torch.linspace(-1.0, 1.0, size).to(device)
        source.add_(total, direction, "w", 9, 0.3)
        specimens.append(total)
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for dtype in dtypes if thorough else dtypes[:2]:
            outs = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
            # several dtypes and scales: rounding differs between them
            source.perturb(total.to(dtype), direction, "w", 5, (1e-3, -0.7), outs)
            specimens += outs
        if thorough:
            specimens.append(source.draw(direction, "w", 7, 7 + size, device, torch.float32))
            specimens.append(source.gather(direction, "w", torch.arange(size, device=device).flip(0).view(2, -1)))
    if thorough:
        specimens += [random_words(7, 1, size, device), torch.tensor(squared_norm(7, size, device))]
    return specimens


_T = TypeVar("_T")


def of_step(by_direction: dict[Direction, _T], direction: Direction) -> dict[Direction, _T]:
    """``by_direction`` without other steps: an update asks for all of a step's directions, tensor by tensor."""
    if by_direction and next(iter(by_direction)).step != direction.step:
        by_direction.clear()
    return by_direction
