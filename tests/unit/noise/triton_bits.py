"""The GPU's noise has the bits of the eager code: by Triton's interpreter, on a CPU; test_triton.py runs this."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.unit.noise.test_kernels import CPU, DTYPES, F32, HERE, SCALES, both, equal
from zoft.noise import counter, kernels
from zoft.noise.counter import gather, random_words, sample, squared_norm
from zoft.noise.kernels import cuda
from zoft.noise.source import LAWS, CounterNoise, agrees
from zoft.subspaces.low_rank import _product
from zoft.weights.tensors import perturbed

SIZES = (0, 1, 33, 2047, 2048, 5000)  # a program makes 2,048
STARTS = (0, 1, 31, 65_536)


@pytest.fixture(scope="module")
def interpreted() -> cuda.CudaKernels:
    return cuda.load()


def test_every_law_operation_and_dtype(interpreted):
    assert agrees(interpreted, CPU)


@pytest.mark.parametrize("law", LAWS)
def test_odd_sizes_and_slices(interpreted, law):
    source = CounterNoise(law, {"w": 120_000})
    torch.manual_seed(0)
    for start, size in product(STARTS, SIZES):
        old = torch.randn(size)

        def draw(start=start, size=size):
            return source.draw(HERE, "w", start, start + size, CPU, F32)

        def add(start=start, old=old):
            out = old.clone()
            source.add_(out, HERE, "w", start, -0.37)
            return out

        def indexed(start=start, size=size):
            return source.gather(HERE, "w", torch.arange(start, start + size).flip(0))

        for work in (draw, add, indexed):
            assert equal(*both(interpreted, work)), (work.__name__, start, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", counter.LAWS)
def test_one_scale_and_several_beside_the_weight_and_in_place(interpreted, law, dtype):
    source = CounterNoise(law, {"w": 120_000})
    torch.manual_seed(1)
    for start, size in product(STARTS[::2], SIZES[1::2]):
        weight = torch.randn(size).to(dtype)
        z = source.draw(HERE, "w", start, start + size, CPU, F32)
        with kernels.using(CPU, interpreted):
            outs = [torch.empty_like(weight) for _ in SCALES[:3]]
            source.perturb(weight, HERE, "w", start, SCALES[:3], outs)
            here = weight.clone()
            source.perturb(here, HERE, "w", start, [0.3], [here])
        assert all(equal(out, perturbed(weight, z, scale)) for out, scale in zip(outs, SCALES, strict=False))
        assert equal(here, perturbed(weight, z, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy, of an infinity that is meant
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_every_number_of_16_bits_is_perturbed_as_eager_torch_does(interpreted, dtype):
    """Subnormals, infinities, overflow, ties and signed zeros among them."""
    weight = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    source, scales = CounterNoise("gaussian", {"w": 1 << 16}), (0.0, 1e-9, 1e-6, 1e-3, 0.5, 300.0)

    def work():
        outs = [torch.empty_like(weight) for _ in scales]
        source.perturb(weight, HERE, "w", 0, scales, outs)
        return torch.cat(outs)

    assert equal(*both(interpreted, work))


@pytest.mark.parametrize("law", counter.LAWS)
@pytest.mark.parametrize("start", [(1 << 31) - 5, (1 << 32) - 1, (1 << 33) + 77, (1 << 35) - 40, (1 << 40) + 3])
def test_elements_beyond_32_bits(interpreted, law, start):
    """Where a block of words ends, too: 2^31 Gaussian elements, 2^35 signs."""
    drawn, eager = both(interpreted, lambda: sample(law, 7, start, start + 100))
    assert equal(drawn, eager)
    assert len(drawn.unique()) > 1
    if start < 1 << 35:  # gather makes every block up to its last index
        indices = torch.arange(start, start + 100)
        assert equal(*both(interpreted, lambda: gather(law, 7, indices, start + 100)))
        assert equal(gather(law, 7, indices, start + 100), eager)


def test_words_and_norms(interpreted):
    for start, stop in ((0, 1), (7, 4999), ((1 << 30) - 9, (1 << 30) + 9)):
        assert equal(*both(interpreted, lambda start=start, stop=stop: random_words(5, start, stop)))
    for count in (1, 2, 2047, 20_001):
        ours, eager = both(interpreted, lambda count=count: squared_norm(5, count))
        assert ours == eager > 0


@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (16, 128, 2), (17, 130, 3), (40, 7, 1), (3, 300, 5)])
def test_a_product_is_added_term_by_term(interpreted, rows, columns, rank):
    torch.manual_seed(2)
    left, right, out = torch.randn(rows, rank), torch.randn(rank, columns), torch.randn(rows * columns)
    wanted = out + (_product(left, right).view(-1) * 0.3)
    assert interpreted.add_product(left, right, out, 0.3)
    assert equal(out, wanted)


def test_autograd_learns_that_a_weight_was_written(interpreted):
    weight = torch.ones(10, requires_grad=True)
    loss = (weight * weight).sum()
    with kernels.using(CPU, interpreted), torch.no_grad():
        CounterNoise("gaussian", {"w": 10}).perturb(weight, HERE, "w", 0, [0.1], [weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
