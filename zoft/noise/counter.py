"""The counter-based generator: random bits from (key, word index), numbers from bits, and numbers put to use.

A hash of (64-bit key, word index) gives 32 random bits, and integer tables turn bits into numbers. Everything up to the
last multiplication is integer arithmetic, so the same bits come out on every device, in any order, for any slice. Where
compiled kernels are in use (zoft.noise.kernels) they do the work; the torch code here defines what they must give.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist

from zoft.noise.kernels import Kernels, Stream, choice
from zoft.utils.lazy import Tensor, torch

LAWS = ("gaussian", "rademacher")
"""What the bits can become: each has mean 0 and variance 1."""

FIXED_POINT = 1 << 16
"""Gaussian quantiles are integers in units of 2^-16: exact in float32, exactly summable."""

_CHUNK_WORDS = 1 << 17  # words hashed at a time: 512 KiB of int32 stays in the cache and bounds the temporaries
_BLOCK_WORDS = 1 << 30  # a word index beyond this moves to another key, so int32 counters never overflow
_PER_WORD = {"words": 1, "gaussian": 2, "rademacher": 32}  # elements made of one word


def compiled_on(device: torch.device | str) -> Kernels | None:
    """The compiled noise in use on a device, None where it is eager."""
    return choice.ACTIVE.get(torch.device(device).type)


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
    out = torch.empty(stop - start, dtype=torch.int32, device=device)
    compiled = compiled_on(device)
    # eager code hashes in pieces that stay in the cache; a kernel needs no temporaries
    at_most = None if compiled else _chunk(device)
    for stream, offset, at, until in _streams("words", key, start, stop, device, at_most=at_most):
        if compiled:
            compiled.words(stream, offset, out[at:until])
        else:
            words = torch.arange(offset, offset + until - at, dtype=torch.int32, device=device)
            out[at:until] = _hash_(words, stream)
    return out


def sample(law: str, key: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements [start, stop) of the stream ``key`` under ``law``, without what comes before them.

    Args:
        law: one of :data:`LAWS`.
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
    if compiled := compiled_on(device):
        out = torch.empty(stop - start, device=device)
        for stream, offset, at, until in _streams(law, key, start, stop, device):
            compiled.draw(stream, offset, out[at:until])
        return out
    if law == "rademacher":
        return _expand(key, start, stop, 32, _signs_of_words, device)
    # quantiles in units of 2^-16: z = q / 2^16, exact in float32
    return _expand(key, start, stop, 2, _quantiles_of_words, device).to(torch.float32).mul_(1.0 / FIXED_POINT)


def gather(law: str, key: int, indices: Tensor, count: int, factor: float = 1.0) -> Tensor:
    """``factor`` times the elements of a stream at any indices, and no others.

    Args:
        law: one of :data:`LAWS`.
        key: 64-bit stream key.
        indices: int64, any shape.
        count: a bound: every index is below it.
        factor: rounded to float32.

    Returns:
        float32, of the shape and on the device of ``indices``.

    Example:
        >>> import torch
        >>> bool((gather("gaussian", 7, torch.tensor([5, 3]), 9) == sample("gaussian", 7, 0, 9)[[5, 3]]).all())
        True
    """
    block_size = _BLOCK_WORDS * _PER_WORD[law]
    out = torch.empty(indices.shape, device=indices.device)
    compiled = compiled_on(indices.device)
    # within one block of words a kernel can take any index
    if compiled and count <= block_size:
        ((stream, *_),) = _streams(law, key, 0, 1, indices.device, factor)
        compiled.gather(stream, indices.contiguous().view(-1), out.view(-1))
        return out
    for stream, offset, first, _ in _streams(law, key, 0, count, indices.device, factor):
        assert offset == 0  # whole blocks; the elements of other blocks are made here too, and not taken
        values = _elements(law, stream, indices - first)
        out = values if first == 0 else torch.where(indices >= first, values, out)
    return out


def add_(out: Tensor, law: str, key: int, start: int, scale: float, factor: float = 1.0) -> None:
    """``out += scale * (factor * z)``: each product rounded to float32, then the sum.

    Args:
        out: float32, flat and contiguous.
        law: one of :data:`LAWS`.
        key: 64-bit stream key.
        start: flat index, in the stream, of the first element of ``out``.
        scale: rounded to float32.
        factor: rounded to float32.
    """
    compiled, stop = compiled_on(out.device), start + out.numel()
    if compiled and out.dtype != torch.float32:
        compiled = None
    at_most = None if compiled else 2 * _chunk(out.device)
    for stream, offset, at, until in _streams(law, key, start, stop, out.device, factor, at_most):
        if compiled:
            compiled.add_(stream, offset, out[at:until], scale)
        else:
            # out <- out + s (f z): each product rounded, then the sum, as the kernels do
            out[at:until].add_(_scaled(law, key, start + at, start + until, out.device, factor).mul_(scale))


def perturb(
    weight: Tensor, law: str, key: int, start: int, scales: Sequence[float], outs: Sequence[Tensor], factor: float = 1.0
) -> None:
    """``outs[i] = weight + scales[i] * (factor * z)``, with z made once; see :func:`perturb_with` for the arithmetic.

    Args:
        weight: flat and contiguous, float32, bfloat16, float16 or float64.
        law: one of :data:`LAWS`.
        key: 64-bit stream key.
        start: flat index, in the stream, of the first element of ``weight``.
        scales: one for each of ``outs``.
        outs: like ``weight``; a single one may be ``weight`` itself.
        factor: rounded to float32.
    """
    compiled, stop = compiled_on(weight.device), start + weight.numel()
    if compiled and weight.dtype not in compiled.dtypes:
        compiled = None
    at_most = None if compiled else 2 * _chunk(weight.device)
    for stream, offset, at, until in _streams(law, key, start, stop, weight.device, factor, at_most):
        pieces = [out[at:until] for out in outs]
        if compiled:
            compiled.perturb(stream, offset, weight[at:until], scales, pieces)
        else:
            z = _scaled(law, key, start + at, start + until, weight.device, factor)
            perturb_with(z, weight[at:until], scales, pieces)


def perturb_with(z: Tensor, weight: Tensor, scales: Sequence[float], outs: Sequence[Tensor]) -> None:
    """``outs[i] = weight + scales[i] * z``: what a perturbed weight is, here and in the compiled kernels.

    The product and the sum are each rounded to the wider dtype of the two, and the result once to ``outs``' dtype.
    """
    # W + s z in the wider dtype of the two, rounded once
    wide = z.to(torch.promote_types(z.dtype, weight.dtype))
    for scale, out in zip(scales, outs, strict=True):
        out.copy_((wide * scale).add_(weight))


def squared_norm(key: int, count: int, device: torch.device | str = "cpu") -> int:
    """||z||^2 of the first ``count`` Gaussian elements, as an exact integer in units of 2^-32."""
    if compiled := compiled_on(device):
        pieces = _streams("gaussian", key, 0, count, device, at_most=1 << 26)  # int64 sums of these cannot overflow
        return sum(compiled.squared_norm(stream, offset, until - at) for stream, offset, at, until in pieces)
    total, step = 0, 2 * _chunk(device)
    for start in range(0, count, step):
        # z^2 in units of 2^-32, as integers: a sum without rounding, in any order
        values = _expand(key, start, min(count, start + step), 2, _quantiles_of_words, device).to(torch.int64)
        total += int(values.mul_(values).sum())
    return total


# ---- where a piece begins and ends -----------------------------------------------------------------------------------


def _streams(
    law: str,
    key: int,
    start: int,
    stop: int,
    device: torch.device | str,
    factor: float = 1.0,
    at_most: int | None = None,
) -> Iterator[tuple[Stream, int, int, int]]:
    """[start, stop) cut where a block of words ends, and into at most ``at_most`` elements.

    Yields:
        (the block's stream, offset of the piece in its block, from where to where in what is being made).
    """
    table = _real_quantile_table(str(device)) if law == "gaussian" else None
    block_size, at, count = _BLOCK_WORDS * _PER_WORD[law], 0, stop - start
    while at < count:
        block, offset = divmod(start + at, block_size)
        # a piece ends with its block of words, or where it is large enough
        until = min(count, at + block_size - offset, at + (at_most or count))
        of_block = key
        if block:
            # a block of 2^30 words has a key of its own, from the stream's key and its number
            of_block = int.from_bytes(hashlib.blake2b(f"{key}|{block}".encode(), digest_size=8).digest(), "little")
        stream = Stream(_int32(of_block & 0xFFFFFFFF), _int32(of_block >> 32), table, factor)
        yield stream, offset, at, until
        at = until


def _chunk(device: torch.device | str) -> int:
    """Words that eager code hashes at a time: more on a GPU, where launches would set the pace and 16 MiB is little."""
    return _CHUNK_WORDS if torch.device(device).type == "cpu" else 32 * _CHUNK_WORDS


# ---- bits to numbers -------------------------------------------------------------------------------------------------


def _scaled(law: str, key: int, start: int, stop: int, device: torch.device, factor: float) -> Tensor:
    z = sample(law, key, start, stop, device)
    return z if factor == 1.0 else z.mul_(factor)


def _expand(key, start, stop, per_word, shape_words, device):  # type: ignore[no-untyped-def]
    """Elements [start, stop) from whole words, ``per_word`` elements each, chunk by chunk."""
    # whole words: the first and last one may hold elements that are not asked for
    first, last, step = start // per_word, -(-stop // per_word), _chunk(device)
    pieces = [shape_words(random_words(key, word, min(last, word + step), device)) for word in range(first, last, step)]
    if not pieces:
        return torch.empty(0, device=device)
    values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return values[start - first * per_word : stop - first * per_word]


def _quantiles_of_words(words: Tensor) -> Tensor:
    """Two 16-bit halves of each word, each the index of a quantile of N(0, 1): int32 [2 * words]."""
    # low half, high half: two quantiles a word
    halves = torch.stack((words & 0xFFFF, (words >> 16) & 0xFFFF), dim=1).view(-1)
    return torch.index_select(_quantile_table(str(words.device)), 0, halves)


def _signs_of_words(words: Tensor) -> Tensor:
    """The 32 bits of each word as +-1: float32 [32 * words]."""
    octets = words.view(torch.uint8).to(torch.int32)  # little-endian on every device torch runs on
    return torch.index_select(_sign_table(str(words.device)), 0, octets).view(-1)


def _elements(law: str, stream: Stream, indices: Tensor) -> Tensor:
    """Elements of one block's stream at any indices: float32; what an index outside of the block gives is no matter."""
    # element i is in word i / 32 (bit i mod 32) or i / 2 (half i mod 2)
    words = _hash_((indices >> (5 if law == "rademacher" else 1)).to(torch.int32), stream)
    if stream.table is None:
        # bit -> -1 or 1
        return (words >> (indices & 31).to(torch.int32)).bitwise_and_(1).mul_(2).sub_(1).to(torch.float32)
    halves = (words >> (indices & 1).mul_(16).to(torch.int32)).bitwise_and_(0xFFFF)
    z = torch.index_select(stream.table, 0, halves.view(-1)).view(indices.shape)
    return z if stream.factor == 1.0 else z.mul_(stream.factor)


@lru_cache(maxsize=8)
def _quantile_table(device: str) -> Tensor:
    """The 65,536 midpoint quantiles of N(0, 1), scaled to unit variance, in units of 2^-16 (int32)."""
    size = 1 << 16
    normal = NormalDist()
    # z_i = Phi^-1((i + 1/2) / 2^16), the upper half; the lower one is its mirror image
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / size) for i in range(size // 2)]
    scale = (size / 2 / sum(x * x for x in upper)) ** 0.5  # midpoints lose a little of the tails' variance
    # integers: the same on every device, and their sums are exact
    positive = [round(x * scale * FIXED_POINT) for x in upper]
    return torch.tensor([-x for x in reversed(positive)] + positive, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _real_quantile_table(device: str) -> Tensor:
    """The quantiles as float32: the integers are below 2^24, so nothing is rounded."""
    return _quantile_table(device).to(torch.float32).mul_(1.0 / FIXED_POINT)


@lru_cache(maxsize=8)
def _sign_table(device: str) -> Tensor:
    """Row b: the eight bits of byte b, least significant first, as +-1 (float32, [256, 8])."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return (2.0 * bits - 1.0).to(device=device, dtype=torch.float32)


def _hash_(indices: Tensor, stream: Stream) -> Tensor:
    """The words at int32 indices of a block, in place."""
    # w <- (index * golden ratio) xor low half of the key, then mixed, plus the high half, mixed
    indices.mul_(_int32(0x9E3779B9)).bitwise_xor_(stream.low)
    return _mix_(_mix_(indices).add_(stream.high))


def _mix_(words: Tensor) -> Tensor:
    """A 32-bit finaliser in place; int32 multiplication wraps, shifts are made logical by a mask."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        # w <- (w xor (w >>> s)) m, twice, then w xor (w >>> 16)
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))


def _int32(value: int) -> int:
    """The unsigned 32-bit ``value`` as the signed one with the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value
