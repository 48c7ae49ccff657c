"""Node directions inside a mixture: a token's own experts get its gradient, and each has a second moment of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import models
from tests.contract.test_nodes import EXACT, gradients, only, queries
from zoft import ZOConfig, ZOTrainer
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes as Estimator
from zoft.noise.direction import Direction
from zoft.optimizers._factors import Factors, of_state, to_state
from zoft.optimizers.whiten import Whiten

FAMILIES = ["tiny_mixtral", "tiny_qwen3_moe"]
IDENTITY = Estimator(response="identity")


def mixture(family, words=("experts",), **fields):
    model = only(getattr(models, family)(**fields), *words)
    model.config.output_router_logits = False
    return model, models.batch_for(model, rows=3, length=7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_of_experts_are_autograds(family, implementation):
    """Of all positions, by a backward pass that stops at the parts and the chain rule inside them."""
    model, batch = mixture(family)
    model.config._experts_implementation = implementation
    factors = queries(model, "loss", positions="all")(batch, Direction(0, 0), EXACT).factors
    assert model.config._experts_implementation == implementation
    model.config._experts_implementation = "eager"
    wanted = gradients(model, batch)
    assert set(factors) == set(wanted)
    assert len(factors) == 4
    for name, one in factors.items():
        assert one.layout == "experts"
        assert len(one.x) == 3 * 6 * {"tiny_mixtral": 2, "tiny_qwen3_moe": 3}[family]  # of a token's experts alone
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_last_block_the_identity_is_the_gradient_itself(family):
    model, batch = mixture(family, ("layers.1.mlp.experts",))
    estimate = queries(model, "hidden")(batch, Direction(0, 0), IDENTITY)
    exact = queries(model, "loss")(batch, Direction(0, 0), EXACT)
    assert estimate.num_queries == 1
    for name, one in exact.factors.items():
        torch.testing.assert_close(estimate.factors[name].dense(), one.dense(), rtol=1e-4, atol=1e-7)


def test_a_part_without_experts_is_computed_without_watching_every_call(monkeypatch):
    model, batch = only(models.tiny_llama(), "mlp"), models.batch_for(models.tiny_llama(), rows=3, length=7)
    monkeypatch.setattr(
        torch.overrides.TorchFunctionMode, "__enter__", lambda self: pytest.fail("every call is watched")
    )
    assert queries(model, "hidden")(batch, Direction(0, 0), IDENTITY).factors


def test_sixteen_bits_lose_no_small_gradients():
    """Late in training node gradients are far below what float16 can hold."""
    model, batch = mixture("tiny_mixtral", ("layers.1.mlp.experts",))
    wide = queries(model, "hidden")(batch, Direction(0, 0), IDENTITY).factors
    ask = queries(model.half(), "hidden")
    read = ask.reader.read

    def faint(part):
        one = read(part)
        return replace(one, slopes=one.slopes * 1e-9)

    ask.reader.read = faint
    factors = ask(batch, Direction(0, 0), IDENTITY).factors
    for name, one in wide.items():
        one, other = one.dense().flatten(), factors[name].scaled(1e9).dense().flatten()
        assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.99, name


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_experts_and_attention_are_trained_beside_them(family):
    model, batch = mixture(family, ("experts", "self_attn.o_proj"))
    factors = queries(model, "loss", positions="all", layers="linear")(batch, Direction(0, 0), EXACT).factors
    wanted = gradients(model, batch)
    assert set(factors) == set(wanted)
    for name, one in factors.items():
        torch.testing.assert_close(one.dense(), wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_two_processes_and_micro_batches_are_one_batch():
    model, batch = mixture("tiny_mixtral")
    whole = queries(model, "loss", positions="all")(batch, Direction(0, 0), EXACT).factors
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    parted = queries(model, "loss", positions="all")(halves, Direction(0, 0), EXACT).factors
    for name, one in whole.items():
        torch.testing.assert_close(parted[name].dense(), one.dense(), rtol=1e-4, atol=1e-7)


def trained(tmp_path, steps, resume=None):
    model, batch = mixture("tiny_mixtral", ("mlp.experts",))
    batch = models.batch_for(model, rows=8, length=7)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(8)]
    args = ZOConfig(
        output_dir=str(tmp_path), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=3,
        logging_strategy="no", per_device_train_batch_size=4, dataloader_pin_memory=False, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = ZOTrainer(model, args, train_dataset=rows)
    assert trainer.method.estimator.response == "identity"
    with torch.no_grad():
        before = float(model(**batch).loss)
        trainer.train(resume_from_checkpoint=resume)
        after = float(model(**batch).loss)
    return before, after, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_mixture_learns_one_query_a_step_and_is_resumed_at_the_same_bits(tmp_path):
    before, after, whole = trained(tmp_path / "whole", 12)
    assert after < before - 0.5
    trained(tmp_path / "parted", 3)
    _, _, resumed = trained(tmp_path / "parted", 12, resume=str(tmp_path / "parted" / "checkpoint-3"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(one, resumed[name]) for name, one in whole.items())


def rows(seed, n=12, m=3, width=5, experts=4):
    draw = torch.Generator().manual_seed(seed)
    number = torch.randint(0, experts, (n,), generator=draw)
    e, x = torch.randn(n, m, generator=draw), torch.randn(n, width, generator=draw)
    return Factors(e, x, "experts", noisy=False, expert=number, num_experts=experts)


def test_factors_of_experts_are_as_many_matrices():
    one, other = rows(0), rows(1)
    wanted = torch.zeros(4, 3, 5)
    for e, x, number in zip(one.e, one.x, one.expert, strict=True):
        wanted[number] += torch.outer(e, x)
    torch.testing.assert_close(one.dense(), wanted)
    assert one.inner(other) == pytest.approx(float((wanted * other.dense()).sum()), rel=1e-5)
    assert one.square() == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    again = of_state(to_state({"w": one}), "cpu")["w"]
    assert torch.equal(again.dense(), one.dense())
    assert again.num_experts == 4


@pytest.mark.parametrize("width", [2, 40])
def test_each_expert_is_whitened_by_its_own_inputs(width):
    """M_j A_j^-1 with A_j of expert j's rows, whether there are more rows than inputs or fewer."""
    whiten, state = Whiten(cooling=0, trust_exact=1e9), {}
    first, second = rows(0, width=width), rows(1, width=width)
    for factor in (first, second):
        step = whiten.steps({"w": factor}, {"w": state}, 1.0, 1.0)["w"].dense()
    x, e, number = state["x"], state["e"], state["expert"]
    omega = 0.95 ** state["age"] / 12
    omega = omega / omega.sum()
    mu = 0.1 * 0.9 ** state["age"]
    ridge = 1.0 * float((omega * x.square().mean(1)).sum()) / len(number.unique())
    for j in range(4):
        of = number == j
        a = (x[of].T * omega[of]) @ x[of] + ridge * torch.eye(width)
        moment = (e[of] * mu[of, None]).T @ x[of]
        torch.testing.assert_close(step[j], moment @ torch.linalg.inv(a), rtol=1e-3, atol=1e-4)


def test_experts_outside_of_a_part_are_refused():
    with pytest.raises(UserError, match=r"inside of their block's feed-forward part.*probed=auto"):
        queries(mixture("tiny_mixtral")[0], probed="layers")
