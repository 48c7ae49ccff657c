"""Stochastic rounding: unbiased, exact where nothing is to round, repeatable, and small updates survive."""

import pytest
import torch

from zoft.rounding import round_stochastically

DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_fit_are_kept(dtype):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    values[:4] = torch.tensor([0.0, -0.0, 1.0, 2.0**-20])
    assert torch.equal(round_stochastically(values, dtype, 3, 0).float().view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-6])
def test_neighbours_and_mean(dtype, scale):
    value = torch.tensor(0.7 * scale)
    rounded = round_stochastically(value.expand(200_000).contiguous(), dtype, 5, 0).float()
    found = rounded.unique()
    unit = float((found[-1] - found[0]).abs())
    assert len(found) == 2
    assert found[0] < value < found[1]
    assert abs(float(rounded.double().mean() - value.double())) < 5 * unit / 200_000**0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_values_mirror(dtype):
    values = torch.linspace(1e-8, 2.0, 10_001)
    plus, minus = (round_stochastically(sign * values, dtype, 9, 0).double().sum() for sign in (1, -1))
    assert abs(float(plus + minus)) < 0.5


def test_bits_belong_to_the_element():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    whole = round_stochastically(values, torch.bfloat16, 7, 100)
    assert torch.equal(whole[333:700], round_stochastically(values[333:700].clone(), torch.bfloat16, 7, 433))
    assert not torch.equal(whole, round_stochastically(values, torch.bfloat16, 8, 100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_small_updates_arrive(dtype):
    """Updates of rms 1e-6 on weights of size 0.02: at least 97 % of the move, where rounding to nearest loses it."""
    generator = torch.Generator().manual_seed(2)
    start = (torch.randn(20_000, generator=generator) * 0.02).to(dtype)
    step = torch.randn(20_000, generator=generator) * 1e-6
    stochastic, nearest = start.clone(), start.clone()
    for number in range(1000):
        stochastic = round_stochastically(stochastic.float() - step, dtype, number, 0)
        nearest = (nearest.float() - step).to(dtype)

    def share(now):
        moved = start.double() - now.double()
        return float((moved * step).sum() / (1000 * step.double() * step).sum())

    assert 0.97 < share(stochastic) < 1.03
    assert share(nearest) < 0.5
