"""The noise on a card has the bits of the CPU's: eager and compiled, every law, dtype and slice, any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.cuda.card import device
from tests.unit.noise.test_kernels import CPU, DTYPES, F32, HERE, SCALES, equal
from zoft.noise import counter, kernels
from zoft.noise.counter import gather, random_words, sample, squared_norm
from zoft.noise.kernels import Kernels, cpu, cuda
from zoft.noise.source import LAWS, CounterNoise, agrees
from zoft.subspaces.low_rank import _product

pytestmark = pytest.mark.cuda
SLICES = [(0, 1), (1, 33), (31, 2047), (65_536, 5000), (3, 300_000)]


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    return cuda.load() if device().type == "cuda" else cpu.load()


def same(compiled: Kernels, work: Callable[[torch.device], torch.Tensor]) -> None:
    """What ``work`` gives on the card, compiled and eager, is what it gives on the CPU."""
    with kernels.using(CPU, None):
        wanted = work(CPU)
    for chosen in (compiled, None):
        with kernels.using(device(), chosen):
            assert equal(work(device()).cpu(), wanted), "compiled" if chosen else "eager"


def test_all_that_a_run_would_compare_and_more(compiled):
    assert agrees(compiled, device())


@pytest.mark.parametrize("law", LAWS)
def test_draw_add_and_gather(compiled, law):
    source = CounterNoise(law, {"w": 400_000})
    for start, size in SLICES:
        old = torch.randn(size, generator=torch.Generator().manual_seed(0))
        same(compiled, lambda where, at=start, n=size: source.draw(HERE, "w", at, at + n, where, F32))
        same(compiled, lambda where, at=start, n=size: source.gather(HERE, "w", torch.arange(at, at + n, device=where)))

        def add(where, start=start, old=old):
            out = old.to(where, copy=True)
            source.add_(out, HERE, "w", start, -0.37)
            return out

        same(compiled, add)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", LAWS)
def test_perturb(compiled, law, dtype):
    source = CounterNoise(law, {"w": 400_000})
    for start, size in SLICES:
        old = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)

        def perturb(where, start=start, old=old):
            weight = old.to(where, copy=True)
            outs = [torch.empty_like(weight) for _ in SCALES]
            source.perturb(weight, HERE, "w", start, SCALES, outs)
            source.perturb(weight, HERE, "w", start, [0.3], [weight])
            return torch.cat([*outs, weight])

        same(compiled, perturb)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(compiled, dtype):
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    source, scales = CounterNoise("gaussian", {"w": 1 << 16}), (0.0, 1e-9, 1e-6, 1e-3, 0.5, 300.0, 3e38)

    def perturb(where):
        outs = [torch.empty_like(weight, device=where) for _ in scales]
        source.perturb(weight.to(where), HERE, "w", 0, scales, outs)
        return torch.cat(outs)

    same(compiled, perturb)


@pytest.mark.parametrize("law", counter.LAWS)
@pytest.mark.parametrize("start", [(1 << 31) - 5, (1 << 32) - 1, (1 << 35) - 40, (1 << 40) + 3])
def test_elements_beyond_32_bits(compiled, law, start):
    same(compiled, lambda where: sample(law, 7, start, start + 100, where))
    if start < 1 << 35:
        same(compiled, lambda where: gather(law, 7, torch.arange(start, start + 100, device=where), start + 100))


def test_a_tensor_of_more_than_2_to_the_31_elements(compiled):
    """Its last elements, and some in the middle; 4.3 GB."""
    on_card = device().type == "cuda"
    if on_card and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of free memory on the card")
    size = (1 << 31) + 5001 if on_card else 50_001
    weight, source = torch.ones(size, dtype=torch.bfloat16, device=device()), CounterNoise("rademacher", {"w": size})
    with kernels.using(device(), compiled):
        source.perturb(weight, HERE, "w", 0, [0.25], [weight])
    for start in (0, size // 2, size - 5001):
        z = source.draw(HERE, "w", start, start + 5001, CPU, F32)
        assert equal(weight[start : start + 5001].cpu(), (1 + 0.25 * z).bfloat16())


def test_words_norms_and_products(compiled):
    same(compiled, lambda where: random_words(5, (1 << 30) - 9, (1 << 30) + 5000, where))
    same(compiled, lambda where: torch.tensor(squared_norm(5, 1_000_001, where)))
    for rows, columns, rank in ((1, 1, 1), (17, 130, 3), (300, 700, 8)):
        left, right, out = torch.randn(rows, rank), torch.randn(rank, columns), torch.randn(rows * columns)
        result = out.to(device(), copy=True)
        if compiled.add_product(left.to(device()), right.to(device()), result, 0.3):
            assert equal(result.cpu(), out + _product(left, right).view(-1) * 0.3)
