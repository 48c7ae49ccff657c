"""The trainable tensors: names, owners, digests, the eps a dtype can represent, and the one line that perturbs."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.models import tiny_opt, tiny_qwen, tiny_t5
from zoft.errors import UserError
from zoft.weights.tensors import Weights, perturbed


def linear(dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3) - 2.5)
        layer.bias.copy_(torch.tensor([0.25, -0.5]))
    return layer.to(dtype)


def test_names_are_those_of_named_parameters_in_order_without_frozen_ones():
    model = tiny_qwen()
    frozen = [name for name, p in model.named_parameters() if "mlp" in name]
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    weights = Weights(model)
    assert list(weights.tensors) == [name for name, _ in model.named_parameters() if name not in frozen]
    assert weights.sizes() == {name: p.numel() for name, p in model.named_parameters() if name not in frozen}
    assert weights.num_elements == sum(weights.sizes().values())


@pytest.mark.parametrize(
    ("make", "name", "num_owners"),
    [(tiny_opt, "embed_tokens", 2), (tiny_qwen, "embed_tokens", 2), (tiny_t5, "shared", 4)],
)
def test_a_tied_tensor_has_one_name_and_all_its_owners(make, name, num_owners):
    weights = Weights(make())
    (canonical,) = [n for n in weights.tensors if name in n or "lm_head" in n]
    holders = [pair for held in weights.owners.values() for pair in held if pair[1] == canonical]
    assert len(holders) == num_owners
    assert sum(len(held) for held in weights.owners.values()) == len(weights.tensors) + num_owners - 1


def test_a_module_used_twice_is_one_owner():
    shared = nn.Linear(2, 2)
    weights = Weights(nn.Sequential(shared, nn.Tanh(), shared))
    assert list(weights.tensors) == ["0.weight", "0.bias"]
    assert list(weights.owners) == [shared]


def test_nothing_trainable_says_how_to_choose():
    with pytest.raises(UserError, match=r"nothing is trainable.*trainable=all.*peft=lora"):
        Weights(linear().requires_grad_(False))


def test_digest_is_equal_exactly_when_the_bits_are():
    base = linear()
    digest = Weights(base).digest()
    assert Weights(linear()).digest() == digest
    assert Weights(linear(torch.bfloat16)).digest() != digest
    base.bias.data[0] = torch.nextafter(base.bias.data[0], torch.tensor(1.0))
    assert Weights(base).digest() != digest
    minus_zero, zero = linear(), linear()
    minus_zero.bias.data.fill_(-0.0)
    zero.bias.data.fill_(0.0)
    assert Weights(minus_zero).digest() != Weights(zero).digest()


def test_digest_sees_names_and_shapes():
    class Named(nn.Module):
        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    digests = {Weights(Named(name, shape)).digest() for name in ("a", "b") for shape in ((6,), (2, 3), (3, 2))}
    assert len(digests) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_digest_takes_every_dtype_and_layout(dtype):
    layer = linear(dtype)
    digest = Weights(layer).digest()
    layer.weight.data = layer.weight.data.t().contiguous().t()  # the same numbers, another stride
    assert Weights(layer).digest() == digest


def test_eps_below_the_dtype_is_refused_and_the_advice_works():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = Weights(nn.Linear(64, 64).to(torch.bfloat16))
    weights.check_eps(1e-3)
    with pytest.raises(UserError, match=r"eps=1e-05 is below what bfloat16 can represent.*for weight,") as caught:
        weights.check_eps(1e-5)
    advised = float(re.search(r"estimator.eps to (\S+) or more", str(caught.value)).group(1))
    weights.check_eps(advised)
    Weights(nn.Linear(64, 64)).check_eps(1e-5)  # float32 can
    with pytest.raises(UserError) as caught:
        Weights(nn.Linear(64, 64)).check_eps(1e-12)
    assert "float32 can represent" in str(caught.value)
    assert "load the weights in float32" not in str(caught.value)


def test_a_sample_is_a_copy_of_some_numbers_of_each_tensor():
    layer = nn.Linear(4, 4)
    whole, some = Weights(layer).sample(), Weights(layer).sample(size=5)
    assert whole.tolist() == [*layer.weight.flatten().tolist(), *layer.bias.tolist()]
    assert some.tolist() == [*whole[:16:4].tolist(), whole[16]]
    layer.bias.data.add_(1)
    assert Weights(layer).sample()[16] == whole[16] + 1


@pytest.mark.parametrize(("eps", "says"), [(1e-3, True), (1e-2, False)])
def test_eps_that_is_too_small_for_the_smaller_part_is_said_and_goes_on(eps, says, caplog):
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).to(torch.bfloat16)
    model[0].weight.data.fill_(0.05)
    Weights(model).check_eps(eps)
    assert ("1.weight" in caplog.text) == says
    assert ("is below what bfloat16 can represent" in caplog.text) == says


def test_eps_at_the_bound_moves_some_weights_and_below_moves_none():
    layer = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    layer.weight.data.fill_(1.0)
    z = torch.ones(256, 256)
    refused = 0.45 * torch.finfo(torch.bfloat16).eps
    with pytest.raises(UserError):
        Weights(layer).check_eps(refused)
    assert torch.equal(perturbed(layer.weight.data, z, refused), layer.weight.data)
    Weights(layer).check_eps(0.55 * torch.finfo(torch.bfloat16).eps)
    assert not torch.equal(perturbed(layer.weight.data, z, 0.55 * torch.finfo(torch.bfloat16).eps), layer.weight.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_perturbed_is_a_new_tensor_rounded_once(dtype):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
    z = torch.randn(1000, generator=generator)
    kept_weight, kept_z = weight.clone(), z.clone()
    result = perturbed(weight, z, 1e-3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == dtype
    assert torch.equal(result, (z.to(wide) * 1e-3 + weight.to(wide)).to(dtype))
    assert torch.equal(weight, kept_weight)
    assert torch.equal(z, kept_z)
    assert result.data_ptr() not in (weight.data_ptr(), z.data_ptr())


def test_perturbing_float64_weights_keeps_their_precision():
    weight = torch.full((4,), 1 / 3, dtype=torch.float64)
    assert torch.equal(perturbed(weight, torch.zeros(4), 1e-3), weight)
