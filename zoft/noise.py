"""Where every random direction comes from: z is a function of (run seed, step, probe, tensor name) and of nothing else.

The default source is a counter (zoft/counter.py): a 64-bit key names the stream, and the same bits come out on every
device, in any order, for any slice; the global generators are never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from zoft import compiled, counter
from zoft.counter import random_words, sample, squared_norm
from zoft.errors import UserError
from zoft.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "LAWS",
    "SOURCES",
    "CounterNoise",
    "Direction",
    "NoiseSource",
    "TorchSequentialNoise",
    "agrees",
    "check_law",
    "key_of",
    "prepare",
    "random_words",
    "sample",
    "squared_norm",
    "step_seed",
]

LAWS = (*counter.LAWS, "sphere")
"""Laws of one direction; each has mean 0 and E||z||^2 = number of elements."""

SOURCES = ("counter", "torch_sequential")
"""``counter``: this module's generator. ``torch_sequential``: MeZO's own stream, for number-for-number comparison."""

_KEEP_IN_PIECES = 1 << 26  # elements of z that torch_sequential keeps while a tensor is asked for in pieces


@dataclass(frozen=True)
class Direction:
    """The name of one random direction; z itself is made when and where it is needed.

    Args:
        seed: the run's seed, or a given step seed (``direction_seeds``).
        step: optimisation step, from 0.
        probe: index of the direction within the step, from 0.
        example: index of the example this direction is for, where each has its own (zoft/laws.py); None for all.
        mix: where given, the direction is the sum of these directions times their factors.
    """

    seed: int
    step: int
    probe: int = 0
    example: int | None = None
    mix: tuple[tuple[Direction, float], ...] = ()


def key_of(direction: Direction, name: str, role: str = "z") -> int:
    """A 64-bit key for one tensor's stream: independent for every seed, step, probe, name and role.

    Example:
        >>> key_of(Direction(0, 1), "a") != key_of(Direction(0, 1), "b")
        True
    """
    text = f"{direction.seed}|{direction.step}|{direction.probe}|{role}|{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class NoiseSource:
    """Where z comes from: :meth:`draw` makes it, the others use it, and make no more of it than they must."""

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
        """``outs[i] = weight + scales[i] * z`` with z made once: the bits of :func:`zoft.weights.perturbed`.

        Args:
            weight: flat and contiguous, float32, bfloat16, float16 or float64.
            direction: which z.
            name: which tensor of it.
            start: flat index, in the tensor, of the first element of ``weight``.
            scales: one multiple of z for each of ``outs``.
            outs: like ``weight``; a single one may be ``weight`` itself.
        """
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
        scales = _of_step(self._scales, direction)
        if direction not in scales:
            total = sum(squared_norm(key_of(direction, name), n, device) for name, n in self.shapes.items())
            scales[direction] = (sum(self.shapes.values()) * counter.FIXED_POINT**2 / total) ** 0.5
        return scales[direction]


class TorchSequentialNoise(NoiseSource):
    """MeZO's stream: one generator a step, seeded with the step's seed, one N(0, 1) draw after another.

    Tensors are drawn in ``named_parameters()`` order, in the parameter's dtype, on the parameter's device. A private
    generator gives the numbers that ``torch.manual_seed`` + ``torch.normal`` would. The generator's state before each
    tensor is kept for the directions of the step in use, so that tensors can also be asked for one by one. A tensor can
    only be drawn whole: one that is asked for in pieces is kept until its last piece (where several directions are
    summed, further ones as long as all of them are at most 64 Mi elements; beyond that they are drawn again).

    Args:
        tensors: (name, shape, dtype, device) in ``named_parameters()`` order.

    References: Malladi et al. 2023 (MeZO), Algorithm 1; the published code draws in this order.
    """

    def __init__(self, tensors: Sequence[tuple[str, torch.Size, torch.dtype, torch.device]]) -> None:
        self.tensors = list(tensors)
        self._shapes = {name: shape for name, shape, _, _ in self.tensors}
        self._dtypes = {name: dtype for name, _, dtype, _ in self.tensors}
        self._states: dict[Direction, dict[str, Tensor]] = {}
        self._in_pieces: dict[Direction, Tensor] = {}  # what is being asked for in pieces: one tensor, flat
        self._in_pieces_of = ""

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, in the parameter's dtype, flat."""
        dtype = self._dtypes[name]  # whatever is asked for: a sum may be float32 where the parameter is not
        states = _of_step(self._states, direction)
        if direction not in states:
            states[direction] = self._record_states(direction)
        if name != self._in_pieces_of:
            self._in_pieces.clear()
            self._in_pieces_of = name
        kept = _of_step(self._in_pieces, direction)
        z = kept.get(direction)
        if z is None:
            generator = torch.Generator(device)
            generator.set_state(states[direction][name])
            shape = self._shapes[name]
            z = torch.normal(mean=0, std=1, size=shape, generator=generator, device=device, dtype=dtype).view(-1)
            if stop < z.numel() and (not kept or (len(kept) + 1) * z.numel() <= _KEEP_IN_PIECES):
                kept[direction] = z
        if stop == z.numel():
            kept.pop(direction, None)
        piece = z[start:stop]
        return piece.clone() if direction in kept else piece  # the caller may overwrite it

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices, in the parameter's dtype; the whole tensor is drawn for them."""
        z = self.draw(direction, name, 0, self._shapes[name].numel(), indices.device, self._dtypes[name])
        return z[indices]

    def _record_states(self, direction: Direction) -> dict[str, Tensor]:
        generators: dict[torch.device, torch.Generator] = {}
        states = {}
        for name, shape, dtype, device in self.tensors:
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(direction.seed)
            states[name] = generators[device].get_state()
            torch.normal(mean=0, std=1, size=shape, generator=generators[device], device=device, dtype=dtype)
        return states


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
    return compiled.prepare(
        num_elements, device, lambda kernels: agrees(kernels, device, thorough=device.type == "cpu")
    )


def agrees(kernels: compiled.Kernels, device: torch.device, *, thorough: bool = True) -> bool:
    """Whether compiled kernels give the bits of the eager code on a few thousand elements.

    Args:
        kernels: what to compare with the eager code.
        device: where.
        thorough: every law, operation and dtype, else two operations: inductor takes seconds to compile each.
    """
    with compiled.using(device, kernels):
        ours = _specimens(device, thorough)
    with compiled.using(device, None):
        return all(torch.equal(a, b) for a, b in zip(ours, _specimens(device, thorough), strict=True))


def _specimens(device: torch.device, thorough: bool) -> list[Tensor]:
    size, direction, made = 4990, Direction(2, 3, 5), []
    for law in LAWS if thorough else ("gaussian",):
        source = CounterNoise(law, {"w": size + 9})
        total = torch.linspace(-1.0, 1.0, size, device=device)
        source.add_(total, direction, "w", 9, 0.3)
        made.append(total)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) if thorough else (torch.float32,):
            outs = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
            source.perturb(total.to(dtype), direction, "w", 5, (1e-3, -0.7), outs)
            made += outs
        if thorough:
            made.append(source.draw(direction, "w", 7, 7 + size, device, torch.float32))
            made.append(source.gather(direction, "w", torch.arange(size, device=device).flip(0).view(2, -1)))
    if thorough:
        made += [random_words(7, 1, size, device), torch.tensor(squared_norm(7, size, device))]
    return made


def step_seed(run_seed: int, step: int) -> int:
    """A 31-bit seed for the step's own generator, for sources that are seeded rather than keyed."""
    return key_of(Direction(run_seed, step), "", role="step_seed") & 0x7FFFFFFF


def check_law(law: str, where: str) -> None:
    """Refuse a law that does not exist, naming ``where`` it was asked for."""
    if law not in LAWS:
        raise UserError(f"{where} must be one of {', '.join(LAWS)}, got {law!r}")


_T = TypeVar("_T")


def _of_step(kept: dict[Direction, _T], direction: Direction) -> dict[Direction, _T]:
    """``kept`` without other steps: an update asks for all of a step's directions, tensor by tensor."""
    if kept and next(iter(kept)).step != direction.step:
        kept.clear()
    return kept
