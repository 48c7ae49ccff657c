# mypy: ignore-errors
"""The noise on a GPU as Triton kernels: the bits of the eager code, made and used in one pass; cuda.py launches them.

As in noise.cpp, each float operation is one of eager torch, rounded on its own (launched with enable_fp_fusion=False),
and a launch stays inside one block of words. A program makes whole words: row w of its tile holds the elements of word
w, so a word is hashed once for 2 (Gaussian) or 32 (Rademacher) of them. Positions are int64, word indices 32 bits.

Triton is imported here, so this file is imported only where kernels are made. Under ``TRITON_INTERPRET=1`` numpy
carries out the same code.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _random_word(index, low, high):
    """The words at the uint32 indices of a block; shifts of unsigned numbers are logical ones."""
    word = (index * 0x9E3779B9) ^ low.to(tl.uint32, bitcast=True)
    return _mix(_mix(word) + high.to(tl.uint32, bitcast=True))


@triton.jit
def _number(word, place, table, factor, GAUSSIAN: tl.constexpr):
    """z from the ``place``-th part of a word: 16 bits that choose a quantile, or one bit that is a sign."""
    if GAUSSIAN:
        half = (word >> (place * 16).to(tl.uint32)) & 0xFFFF
        z = tl.load(table + half.to(tl.int32)) * factor
    else:
        z = ((word >> place.to(tl.uint32)) & 1).to(tl.float32) * 2.0 - 1.0
    return z


@triton.jit
def _tile(table, low, high, factor, first, lead, count, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr):
    """This program's positions in the caller's tensor, which of them are there, and their z: [WORDS, elements a word].

    ``first`` is the word that holds the first element wanted, and ``lead`` how many of its elements come before that.
    """
    PER: tl.constexpr = 2 if GAUSSIAN else 32
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = _random_word((first + index).to(tl.uint32), low, high)
    place = tl.arange(0, PER)[None, :]
    at = index[:, None] * PER + place - lead
    return at, (at >= 0) & (at < count), _number(word[:, None], place, table, factor, GAUSSIAN)


@triton.jit
def _scale(low, high, wide: tl.constexpr):
    """A multiple of z, whose 64 bits came as two halves: a float argument would be a float32."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True).to(wide)


@triton.jit
def _wide(value):
    """A weight in the wider dtype of itself and float32: exact."""
    if value.dtype == tl.float64:
        wide = value
    elif value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """To nearest even. bfloat16 by its bits: a card's own instruction gives the same, Triton's interpreter does not."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = tl.where(value != value, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        stored = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(dtype)
    return stored


@triton.jit(do_not_specialize=["low", "high", "first"])
def words(out, low, high, first, count, WORDS: tl.constexpr):
    """``out`` = the words from ``first`` on, int32."""
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    word = _random_word((first + index).to(tl.uint32), low, high)
    tl.store(out + index, word.to(tl.int32, bitcast=True), mask=index < count)


@triton.jit(do_not_specialize=["low", "high", "first"])
def draw(out, table, low, high, factor, first, lead, count, GAUSSIAN: tl.constexpr, WORDS: tl.constexpr):
    """``out = z``, float32."""
    at, here, z = _tile(table, low, high, factor, first, lead, count, GAUSSIAN, WORDS)
    tl.store(out + at, z, mask=here)


_SCALES = ["low_a", "high_a", "low_b", "high_b"]


@triton.jit(do_not_specialize=["low", "high", "first", *_SCALES])
def perturb(
    weight,
    out_a,
    out_b,
    low_a,
    high_a,
    low_b,
    high_b,
    table,
    low,
    high,
    factor,
    first,
    lead,
    count,
    TWO: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    WORDS: tl.constexpr,
):
    """``out = weight + scale * z`` for one scale or two, in the wider dtype, rounded once; one may be the weight."""
    at, here, z = _tile(table, low, high, factor, first, lead, count, GAUSSIAN, WORDS)
    old = tl.load(weight + at, mask=here)
    exact = _wide(old)
    z = z.to(exact.dtype)
    tl.store(out_a + at, _rounded(z * _scale(low_a, high_a, exact.dtype) + exact, old.dtype), mask=here)
    if TWO:
        tl.store(out_b + at, _rounded(z * _scale(low_b, high_b, exact.dtype) + exact, old.dtype), mask=here)


@triton.jit(do_not_specialize=["low", "high"])
def gather(out, indices, table, low, high, factor, count, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr):
    """``out = z[indices]``, float32 of int64 indices from the block's start."""
    PER: tl.constexpr = 2 if GAUSSIAN else 32
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + at, mask=at < count, other=0)
    word = _random_word((index // PER).to(tl.uint32), low, high)
    tl.store(out + at, _number(word, (index % PER).to(tl.int32), table, factor, GAUSSIAN), mask=at < count)


@triton.jit(do_not_specialize=["low", "high", "first"])
def squared_norm(out, table, low, high, first, lead, count, WORDS: tl.constexpr):
    """``out[program]`` = the sum of squares of its Gaussians, int64 in units of 2^-32."""
    _, here, z = _tile(table, low, high, 1.0, first, lead, count, True, WORDS)
    whole = tl.where(here, (z * 65536.0).to(tl.int64), 0)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(whole * whole, axis=1), axis=0))


@triton.jit
def add_product(out, left, right, scale, rows, columns, rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``out[i, j] += scale * sum_k left[i, k] right[k, j]``, term by term, each rounded by itself: all float32."""
    wide = tl.cdiv(columns, COLUMNS)
    i = (tl.program_id(0) // wide).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = (tl.program_id(0) % wide).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    z = tl.load(left + i * rank, mask=i < rows)[:, None] * tl.load(right + j, mask=j < columns)[None, :]
    for k in range(1, rank):
        u = tl.load(left + i * rank + k, mask=i < rows)
        z += u[:, None] * tl.load(right + k * columns + j, mask=j < columns)[None, :]
    at, here = i[:, None] * columns + j[None, :], (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(out + at, tl.load(out + at, mask=here) + z * scale, mask=here)
