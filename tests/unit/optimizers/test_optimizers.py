"""Update rules against torch's own optimizers, chunk by chunk, and the ZOOptimizer that writes the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoft.engines.layerwise import Layerwise
from zoft.errors import UserError
from zoft.noise.direction import Direction
from zoft.optimizers.adam import Adam
from zoft.optimizers.momentum import Momentum
from zoft.optimizers.sgd import SGD
from zoft.step.estimate import StepEstimate
from zoft.step.update import ZOOptimizer
from zoft.subspaces import base
from zoft.subspaces.full import Full
from zoft.weights.tensors import Weights

LR, DECAY = 0.03, 0.1


def model_of(dtype=torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def zo_optimizer_of(model: nn.Module, rule, lr: float = LR, decay: float = 0.0) -> ZOOptimizer:
    weights = Weights(model)
    session = Layerwise().bind(model, Full().bind(weights), lambda batch: torch.zeros(()))
    return ZOOptimizer([{"params": list(weights.tensors.values()), "weight_decay": decay}], rule, session, lr)


def terms_of(step: int) -> list[tuple[Direction, float]]:
    return [(Direction(0, step, 0), 0.7 - 0.2 * step), (Direction(0, step, 1), -0.4)]


def run(zo_optimizer: ZOOptimizer, steps: range) -> None:
    for step in steps:
        zo_optimizer.apply(StepEstimate.of(terms_of(step)))


def estimate(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    coordinates = Full().bind(Weights(model))
    return {name: sum(c * coordinates.z(d, name) for d, c in terms_of(step)) for name in coordinates.weights.tensors}


REFERENCES = {
    "sgd": (SGD(), lambda params: torch.optim.SGD(params, lr=LR)),
    "adam": (Adam(), lambda params: torch.optim.Adam(params, lr=LR)),
    "adam_betas": (
        Adam(adam_beta1=0.5, adam_beta2=0.9, adam_epsilon=1e-3),
        lambda params: torch.optim.Adam(params, lr=LR, betas=(0.5, 0.9), eps=1e-3),
    ),
}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_equal_those_of_torch(name, chunk, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    rule, make = REFERENCES[name]
    ours, theirs = model_of(), model_of()
    reference = make(theirs.parameters())
    zo_optimizer = zo_optimizer_of(ours, rule)
    for step in range(6):
        run(zo_optimizer, range(step, step + 1))
        for parameter, gradient in zip(theirs.parameters(), estimate(ours, step).values(), strict=True):
            parameter.grad = gradient.clone()
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_momentum_is_the_running_mean_of_the_estimates():
    model = model_of()
    zo_optimizer = zo_optimizer_of(model, Momentum(beta=0.8))
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for step in range(4):
        run(zo_optimizer, range(step, step + 1))
        for name, gradient in estimate(model, step).items():
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            wanted[name] = wanted[name] - LR * mean[name]
            torch.testing.assert_close(model.get_parameter(name).data, wanted[name], rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(zo_optimizer.moments[name]["momentum"], mean[name], rtol=2e-6, atol=1e-6)


def test_momentum_without_past_is_sgd():
    one, two = model_of(), model_of()
    run(zo_optimizer_of(one, Momentum(beta=0.0)), range(3))
    run(zo_optimizer_of(two, SGD()), range(3))
    assert Weights(one).digest() == Weights(two).digest()


@pytest.mark.parametrize("rule", [SGD(), Momentum(), Adam()], ids=lambda rule: rule.name())
def test_weight_decay_is_decoupled(rule):
    """theta' with decay = theta' without - lr * decay * theta, and the state does not see it."""
    plain, decayed = model_of(), model_of()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    zo_optimizers = zo_optimizer_of(plain, rule), zo_optimizer_of(decayed, rule, decay=DECAY)
    for zo_optimizer in zo_optimizers:
        run(zo_optimizer, range(1))
    for name, before in start.items():
        difference = plain.get_parameter(name).data - decayed.get_parameter(name).data
        torch.testing.assert_close(difference, LR * DECAY * before, rtol=1e-4, atol=1e-6)
        for key, moment in zo_optimizers[0].moments.get(name, {}).items():
            assert torch.equal(moment, zo_optimizers[1].moments[name][key])


def test_decay_equals_adamw():
    ours, theirs = model_of(), model_of()
    reference = torch.optim.AdamW(theirs.parameters(), lr=LR, weight_decay=DECAY)
    zo_optimizer = zo_optimizer_of(ours, Adam(), decay=DECAY)
    for step in range(5):
        run(zo_optimizer, range(step, step + 1))
        for parameter, gradient in zip(theirs.parameters(), estimate(ours, step).values(), strict=True):
            parameter.grad = gradient.clone()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_shapes():
    assert SGD().state_shapes((2, 3)) == {}
    assert Momentum().state_shapes((2, 3)) == {"momentum": (2, 3)}
    assert Adam().state_shapes((2, 3)) == {"moment1": (2, 3), "moment2": (2, 3)}


def test_state_is_float32_for_low_precision_weights():
    zo_optimizer = zo_optimizer_of(model_of(torch.bfloat16), Adam())
    run(zo_optimizer, range(2))
    assert {t.dtype for state in zo_optimizer.moments.values() for t in state.values()} == {torch.float32}


def test_the_learning_rate_of_the_group_is_the_one_used():
    model = model_of()
    before = model[0].weight.detach().clone()
    zo_optimizer = zo_optimizer_of(model, SGD(), lr=1.0)
    zo_optimizer.param_groups[0]["lr"] = 0.5  # what a scheduler does
    run(zo_optimizer, range(1))
    torch.testing.assert_close(
        before - model[0].weight.data, 0.5 * estimate(model, 0)["0.weight"], rtol=1e-5, atol=1e-6
    )


def test_groups_keep_their_own_decay():
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zo_optimizer = zo_optimizer_of(model, SGD())
    weights, biases = [model[0].weight, model[1].weight], [model[0].bias]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": biases, "weight_decay": 0.0}]
    zo_optimizer = ZOOptimizer(groups, SGD(), zo_optimizer.session, LR)
    run(zo_optimizer, range(1))
    for name, gradient in estimate(model, 0).items():
        decay = 0.0 if name.endswith("bias") else DECAY
        wanted = before[name] - LR * (gradient + decay * before[name])
        torch.testing.assert_close(model.get_parameter(name).data, wanted, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_moves_nothing_and_is_not_an_update():
    model = model_of()
    zo_optimizer = zo_optimizer_of(model, Adam())
    run(zo_optimizer, range(2))
    digest, moments = Weights(model).digest(), zo_optimizer.moments["0.weight"]["moment1"].clone()
    zo_optimizer.next_estimate = lambda: StepEstimate([Direction(0, 2)])
    zo_optimizer.step()
    zo_optimizer.apply(StepEstimate([Direction(0, 3)]))
    assert Weights(model).digest() == digest
    assert torch.equal(zo_optimizer.moments["0.weight"]["moment1"], moments)
    assert zo_optimizer.progress.updates == 2


def test_an_estimate_is_used_once():
    """A loop's `step` takes a new one each time, applies it as `apply` does, and moves nothing where there is none."""
    model, applied = model_of(), model_of()
    zo_optimizer = zo_optimizer_of(model, SGD())
    given = iter([StepEstimate.of(terms_of(step)) for step in range(2)])
    zo_optimizer.next_estimate = lambda: next(given)
    for step in range(2):
        zo_optimizer.step()
        run(zo_optimizer_of(applied, SGD()), range(step, step + 1))
        assert Weights(model).digest() == Weights(applied).digest()
    with pytest.raises(StopIteration):
        zo_optimizer.step()
    zo_optimizer.next_estimate = None
    with pytest.raises(AssertionError, match="nothing was given to take estimates from"):
        zo_optimizer.step()
    assert Weights(model).digest() == Weights(applied).digest()
    assert zo_optimizer.progress.updates == 2


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="takes no closure"):
        zo_optimizer_of(model_of(), SGD()).step(lambda: 0.0)


def test_bad_values_name_their_field():
    for cls in (SGD, Momentum, Adam):
        for field in ("learning_rate", "weight_decay"):
            for value in (-1.0, float("nan")):
                with pytest.raises(UserError, match=rf"{cls.name()}.{field} must be >= 0"):
                    cls(**{field: value})
    for field, value in [("adam_beta1", 1.0), ("adam_beta2", -0.1), ("adam_epsilon", 0.0)]:
        with pytest.raises(UserError, match=rf"adam.{field} must be"):
            Adam(**{field: value})
    with pytest.raises(UserError, match=r"momentum.beta must be in \[0, 1\), got 1.0"):
        Momentum(beta=1.0)


def test_a_checkpoint_of_another_optimizer_is_refused():
    saved = zo_optimizer_of(nn.Linear(3, 2), Momentum()).state_dict()
    other = zo_optimizer_of(nn.Linear(3, 2), Adam())
    with pytest.raises(UserError, match=r"made with optimizer=momentum, this run has optimizer=adam"):
        other.load_state_dict(saved)
