"""Stochastic rounding: unbiased, exact where nothing is to round, repeatable, and small updates survive."""

from itertools import pairwise

import pytest
import torch

from zoft.trainer.loss import with_float32_losses
from zoft.weights.rounding import follow_, round_stochastically, round_sum

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
    neighbours = rounded.unique()
    unit = float((neighbours[-1] - neighbours[0]).abs())
    assert len(neighbours) == 2
    assert neighbours[0] < value < neighbours[1]
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_master_follows_what_was_written_element_by_element(dtype):
    master = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    weight = master.to(dtype)
    expected = master.clone()
    assert torch.equal(follow_(master, weight).view(torch.int32), expected.view(torch.int32))
    weight[3], weight[4], weight[5] = 7.0, -0.0, float("nan")
    master[4], expected[3], expected[4] = 0.0, 7.0, -0.0
    follow_(master, weight)
    assert bool(master[5].isnan())
    others = [i for i in range(1000) if i != 5]
    assert torch.equal(master[others].view(torch.int32), expected[others].view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 2.0**-10, 0.0])
def test_a_sum_is_rounded_once_however_many_steps_lead_to_it(dtype, scale):
    """The way does not matter, the end is within a unit of the sum, and on average it is the sum."""
    generator = torch.Generator().manual_seed(4)
    weight = (scale * (1.5 + 0.4 * torch.rand(50_000, generator=generator))).to(dtype)  # of one binade
    ends = torch.randn(50_000, generator=generator) * 1e-5
    path = [torch.zeros(50_000), *(ends * (k / 20) + 1e-6 * k * (20 - k) for k in range(1, 20)), ends]
    walked = sum(round_sum(weight, a.clone(), b.clone(), 5, 0) for a, b in pairwise(path))
    direct = round_sum(weight, torch.zeros(50_000), ends.clone(), 5, 0)
    assert torch.allclose(walked, direct, rtol=0, atol=1e-9)
    unit = torch.finfo(dtype).eps * 2.0 ** (weight.float().abs().max().log2().floor() if scale else -100)
    unit = max(float(unit), 2.0**-24) if dtype == torch.float16 else float(unit)
    assert float((direct - ends).abs().max()) <= unit * (1 + 1e-3) + 1e-9
    assert abs(float((direct - ends).double().mean())) < 5 * unit / 50_000**0.5 + 1e-9
    if scale:
        assert torch.equal((weight.float() - direct).to(dtype).float(), weight.float() - direct)  # it can be written


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_stands_still_moves_nothing(dtype):
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(5)).to(dtype)
    here = torch.randn(1000, generator=torch.Generator().manual_seed(6))
    assert not round_sum(weight, here.clone(), here.clone(), 7, 0).any()


def test_the_bits_of_a_sum_belong_to_the_element():
    generator = torch.Generator().manual_seed(7)
    weight, after = torch.randn(1000, generator=generator).bfloat16(), 1e-3 * torch.randn(1000, generator=generator)
    whole = round_sum(weight, torch.zeros(1000), after.clone(), 8, 100)
    piece = round_sum(weight[333:700], torch.zeros(367), after[333:700].clone(), 8, 433)
    assert torch.equal(whole[333:700], piece)


def test_a_loss_function_is_given_float32_where_a_model_gives_it_less():
    calls = []
    logits, label = torch.tensor([[4.0, 1.01]]), torch.tensor([1])

    def objective(dtype):
        calls.append(torch.overrides._get_current_function_mode() is not None)
        return torch.nn.CrossEntropyLoss()(logits.to(dtype), label)

    for dtype, watched in [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]:
        calls.clear()
        wide = with_float32_losses(objective)
        losses = [wide(dtype) for _ in range(3)]
        exact = torch.nn.functional.cross_entropy(logits.to(dtype).float(), label)
        assert all(torch.equal(loss, exact) for loss in losses)
        assert calls == [True, watched, watched]
