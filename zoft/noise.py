"""Where every random direction comes from: z is a function of (run seed, step, probe, tensor name) and of nothing else.

The default source is a counter: a 64-bit key names the stream, a hash of (key, word index) gives 32 random bits, and
integer tables turn bits into numbers. Everything up to the last multiplication is integer arithmetic, so the same
bits come out on every device, in any order, for any slice, and the global generators are never touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeVar

from zoft.errors import UserError
from zoft.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LAWS = ("gaussian", "rademacher", "sphere")
"""Laws of one direction; each has mean 0 and E||z||^2 = number of elements."""

SOURCES = ("counter", "torch_sequential")
"""``counter``: this module's generator. ``torch_sequential``: MeZO's own stream, for number-for-number comparison."""

_CHUNK_WORDS = 1 << 17  # words hashed at a time: 512 KiB of int32 stays in the cache and bounds the temporaries
_PIECE = 2 * _CHUNK_WORDS  # elements of z made at a time where it is only added to something
_KEEP_IN_PIECES = 1 << 26  # elements of z that torch_sequential keeps while a tensor is asked for in pieces
_BLOCK_WORDS = 1 << 30  # a word index beyond this moves to another key, so int32 counters never overflow
_FIXED_POINT = 1 << 16  # Gaussian quantiles are integers in units of 2^-16: exact in float32, exactly summable


@dataclass(frozen=True)
class Direction:
    """The name of one random direction; z itself is made when and where it is needed.

    Args:
        seed: the run's seed, or a given step seed (``direction_seeds``).
        step: optimisation step, from 0.
        probe: index of the direction within the step, from 0.
    """

    seed: int
    step: int
    probe: int = 0


def key_of(direction: Direction, name: str, role: str = "z") -> int:
    """A 64-bit key for one tensor's stream: independent for every seed, step, probe, name and role.

    Example:
        >>> key_of(Direction(0, 1), "a") != key_of(Direction(0, 1), "b")
        True
    """
    text = f"{direction.seed}|{direction.step}|{direction.probe}|{role}|{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_words(key: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each word index in [start, stop), as int32, the same on every device.

    Two rounds of a 32-bit finaliser (xor-shift and odd multiply), each keyed with one half of ``key``.

    Args:
        key: 64-bit stream key.
        start: first word.
        stop: one past the last word.
        device: where to make them.

    Returns:
        int32 tensor of shape [stop - start].
    """
    pieces = []
    while start < stop:
        block = start // _BLOCK_WORDS
        end = min(stop, (block + 1) * _BLOCK_WORDS, start + _CHUNK_WORDS)
        low, high = _block_key(key, block)
        offset = start - block * _BLOCK_WORDS
        words = torch.arange(offset, offset + end - start, dtype=torch.int32, device=device)
        words.mul_(_int32(0x9E3779B9)).bitwise_xor_(low)
        _mix_(words)
        words.add_(high)
        pieces.append(_mix_(words))
        start = end
    if not pieces:
        return torch.empty(0, dtype=torch.int32, device=device)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def sample(law: str, key: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements [start, stop) of the stream ``key`` under ``law``, without what comes before them.

    Args:
        law: ``gaussian`` or ``rademacher`` (``sphere`` is a Gaussian scaled over all tensors: :class:`CounterNoise`).
        key: 64-bit stream key.
        start: first element (flat index in the whole tensor).
        stop: one past the last element.
        device: where to make them.

    Returns:
        float32 tensor of shape [stop - start], mean 0 and variance 1.

    Example:
        >>> bool((sample("gaussian", 7, 3, 9) == sample("gaussian", 7, 0, 9)[3:]).all())
        True
    """
    if law == "rademacher":
        return _expand(key, start, stop, 32, _signs_of_words, device)
    return _expand(key, start, stop, 2, _quantiles_of_words, device).to(torch.float32).mul_(1.0 / _FIXED_POINT)


def squared_norm(key: int, count: int, device: torch.device | str = "cpu") -> int:
    """||z||^2 of the first ``count`` Gaussian elements, as an exact integer in units of 2^-32."""
    total = 0
    for start in range(0, count, 2 * _CHUNK_WORDS):
        stop = min(count, start + 2 * _CHUNK_WORDS)
        values = _expand(key, start, stop, 2, _quantiles_of_words, device).to(torch.int64)
        total += int(values.mul_(values).sum())
    return total


class NoiseSource:
    """Where z comes from: :meth:`draw` makes it, the others put it to use without making more of it than they need."""

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
            float32, of the shape and on the device of ``indices``: the elements that :meth:`draw` gives.
        """
        stop = int(indices.max()) + 1 if indices.numel() else 0
        z = self.draw(direction, name, 0, stop, indices.device, torch.float32)
        return torch.index_select(z, 0, indices.reshape(-1)).view(indices.shape).to(torch.float32)

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
        wide = z.to(torch.promote_types(z.dtype, weight.dtype))
        for scale, out in zip(scales, outs, strict=True):
            out.copy_((wide * scale).add_(weight))  # rounded once, by the copy


@dataclass
class CounterNoise(NoiseSource):
    """z by counter: the default source.

    Args:
        law: one of :data:`LAWS`.
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
        key = key_of(direction, name)
        if self.law != "sphere":
            return sample(self.law, key, start, stop, device)
        return sample("gaussian", key, start, stop, device).mul_(self._sphere_scale(direction, device))

    def gather(self, direction: Direction, name: str, indices: Tensor) -> Tensor:
        """Elements of z at any flat indices, and no others: float32, of the shape and device of ``indices``."""
        key, per_word = key_of(direction, name), 32 if self.law == "rademacher" else 2
        block_size = _BLOCK_WORDS * per_word
        # the largest index is asked for only where it could matter: it stops a GPU's queue
        several = self.shapes.get(name, block_size + 1) > block_size and indices.numel()
        blocks = int(indices.max()) // block_size + 1 if several else 1
        z = _elements(self.law, _block_key(key, 0), indices, per_word)
        for block in range(1, blocks):
            there = _elements(self.law, _block_key(key, block), indices - block * block_size, per_word)
            z = torch.where(indices >= block * block_size, there, z)
        return z.mul_(self._sphere_scale(direction, indices.device)) if self.law == "sphere" else z

    def add_(self, out: Tensor, direction: Direction, name: str, start: int, scale: float) -> None:
        """``out += scale * z[start : start + out.numel()]``, a piece of z at a time (see the base class)."""
        for at in range(0, out.numel(), _PIECE):
            super().add_(out[at : at + _PIECE], direction, name, start + at, scale)

    def perturb(
        self,
        weight: Tensor,
        direction: Direction,
        name: str,
        start: int,
        scales: Sequence[float],
        outs: Sequence[Tensor],
    ) -> None:
        """``outs[i] = weight + scales[i] * z``, a piece of z at a time (see the base class)."""
        for at in range(0, weight.numel(), _PIECE):
            pieces = [out[at : at + _PIECE] for out in outs]
            super().perturb(weight[at : at + _PIECE], direction, name, start + at, scales, pieces)

    def _sphere_scale(self, direction: Direction, device: torch.device) -> float:
        # sqrt(d) / ||z||: the sum of squares is exact integer arithmetic, so every device finds the same scale
        scales = _of_step(self._scales, direction)
        if direction not in scales:
            total = sum(squared_norm(key_of(direction, name), n, device) for name, n in self.shapes.items())
            scales[direction] = (sum(self.shapes.values()) * _FIXED_POINT**2 / total) ** 0.5
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
        self._states: dict[Direction, dict[str, Tensor]] = {}
        self._in_pieces: dict[Direction, Tensor] = {}  # what is being asked for in pieces: one tensor, flat
        self._in_pieces_of = ""

    def draw(
        self, direction: Direction, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Elements [start, stop) of tensor ``name`` of z, in the parameter's dtype, flat."""
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
    """Make the noise of a run of this size quick; to be called once, before its first step.

    Args:
        num_elements: how many weights are trained.
        device: where they are.

    Returns:
        ``compiled`` or ``eager``: how z is made from now on; its bits are the same.
    """
    del num_elements, device
    return "eager"


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


# ---- bits to numbers -------------------------------------------------------------------------------------------------


def _expand(key, start, stop, per_word, shape_words, device):  # type: ignore[no-untyped-def]
    """Elements [start, stop) from whole words, ``per_word`` elements each, chunk by chunk."""
    first, last = start // per_word, -(-stop // per_word)
    pieces = [
        shape_words(random_words(key, word, min(last, word + _CHUNK_WORDS), device))
        for word in range(first, last, _CHUNK_WORDS)
    ]
    if not pieces:
        return torch.empty(0, device=device)
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return values[start - first * per_word : stop - first * per_word]


def _quantiles_of_words(words: Tensor) -> Tensor:
    """Two 16-bit halves of each word, each the index of a quantile of N(0, 1): int32 [2 * words]."""
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=1).view(-1)
    return torch.index_select(_quantile_table(str(words.device)), 0, halves)


def _signs_of_words(words: Tensor) -> Tensor:
    """The 32 bits of each word as +-1: float32 [32 * words]."""
    octets = words.view(torch.uint8).to(torch.int32)  # little-endian on every device torch runs on
    return torch.index_select(_sign_table(str(words.device)), 0, octets).view(-1)


def _elements(law: str, block_key: tuple[int, int], indices: Tensor, per_word: int) -> Tensor:
    """Elements of one block's stream at any indices in it: float32; what an index outside of it gives is undefined."""
    low, high = block_key
    words = torch.div(indices, per_word, rounding_mode="floor").to(torch.int32)
    words.mul_(_int32(0x9E3779B9)).bitwise_xor_(low)
    words = _mix_(_mix_(words).add_(high))
    if law == "rademacher":
        bits = (words >> (indices & 31).to(torch.int32)).bitwise_and_(1)
        return bits.mul_(2).sub_(1).to(torch.float32)
    halves = (words >> (indices & 1).mul_(16).to(torch.int32)).bitwise_and_(0xFFFF)
    quantiles = torch.index_select(_quantile_table(str(indices.device)), 0, halves.view(-1)).view(indices.shape)
    return quantiles.to(torch.float32).mul_(1.0 / _FIXED_POINT)


@lru_cache(maxsize=8)
def _quantile_table(device: str) -> Tensor:
    """The 65,536 midpoint quantiles of N(0, 1), scaled to unit variance, in units of 2^-16 (int32)."""
    size = 1 << 16
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / size) for i in range(size // 2)]
    scale = (size / 2 / sum(x * x for x in upper)) ** 0.5  # midpoints lose a little of the tails' variance
    positive = [round(x * scale * _FIXED_POINT) for x in upper]
    return torch.tensor([-x for x in reversed(positive)] + positive, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _sign_table(device: str) -> Tensor:
    """Row b: the eight bits of byte b, least significant first, as +-1 (float32, [256, 8])."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2.0 * bits - 1.0).to(device=device, dtype=torch.float32)


def _mix_(words: Tensor) -> Tensor:
    """A 32-bit finaliser in place; int32 multiplication wraps, shifts are made logical by a mask."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def _block_key(key: int, block: int) -> tuple[int, int]:
    if block:
        key = int.from_bytes(hashlib.blake2b(f"{key}|{block}".encode(), digest_size=8).digest(), "little")
    return _int32(key & 0xFFFFFFFF), _int32(key >> 32)


def _int32(value: int) -> int:
    """The unsigned 32-bit ``value`` as the signed one with the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value
