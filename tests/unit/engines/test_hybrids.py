"""Backward passes beside queries: torch's own first-order steps, exact gradients above, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from tests import models
from tests.unit.step.test_query import Steps
from zoft import ZOConfig, ZOTrainer
from zoft.component import components
from zoft.errors import UserError
from zoft.lm.data.tokens import OptionCollator
from zoft.lm.models.trainable.last_blocks import LastBlocks
from zoft.lm.objectives.options import Options
from zoft.noise.direction import step_seed
from zoft.optimizers.adamw import AdamW

EVERY = ["backprop", "addax", "hybrid"]


def make(estimator: str, **fields: Any) -> Any:
    return components("estimator")[estimator](**fields)


def steps(estimator: Any, optimizer: Any = "sgd", model: nn.Module | None = None, **given: Any) -> Steps:
    return Steps(estimator, "mean", optimizer, model=model or models.tiny_opt(), **given)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def gradients_of(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    gradients = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    return dict(zip(dict(model.named_parameters()), gradients, strict=True))


def without_noise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All but what has no gradient: attention does not see a bias of all keys, and Adam makes steps of its rounding."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("k_proj.bias")}


def assert_close(values: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(values[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# -------------------------------------------------------------------------------------------------------- first order


@pytest.mark.parametrize("engine", ["layerwise", "in_place", "side_path"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bert", "t5"])
def test_backprop_with_sgd_is_torchs_sgd(family, engine):
    """Tied weights (opt, gpt2, t5) move once, by the sum of their gradients."""
    run, plain = (steps(make("backprop"), model=models.EVERY[family](), lr=0.1, engine=engine) for _ in range(2))
    torchs = torch.optim.SGD(plain.model.parameters(), lr=0.1)
    for _ in range(3):
        asked = run.step()
        torchs.zero_grad()
        loss = plain.model(**plain.batch).loss
        loss.backward()
        torchs.step()
        assert asked.loss == pytest.approx(float(loss.detach()), rel=1e-6)
        assert asked.is_usable
        assert asked.num_queries == 3
    assert_close(tensors_of(run.model), tensors_of(plain.model))


def test_backprop_with_adam_is_torchs_adamw():
    run, plain = (steps(make("backprop"), AdamW(weight_decay=0.1), lr=1e-2) for _ in range(2))
    for group in run.zo_optimizer.param_groups:
        group["weight_decay"] = 0.1
    torchs = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        run.step()
        torchs.zero_grad()
        plain.model(**plain.batch).loss.backward()
        torchs.step()
    assert_close(tensors_of(run.model), without_noise(tensors_of(plain.model)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_take_the_step_too(dtype):
    run, plain = (steps(make("backprop"), model=models.tiny_opt().to(dtype), lr=0.5) for _ in range(2))
    gradients, before = gradients_of(plain.model, plain.batch), tensors_of(plain.model)
    run.step()
    for name, tensor in tensors_of(run.model).items():
        wanted = (before[name].float() - 0.5 * gradients[name].float()).to(dtype)
        torch.testing.assert_close(tensor, wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "muon", "sign", "adamu", "hessian"])
def test_backprop_goes_downhill_with_other_optimizers_or_says_why_not(optimizer):
    try:
        run = steps(make("backprop"), optimizer, lr=1e-3)
    except UserError:
        return
    start = float(run.model(**run.batch).loss.detach())
    for _ in range(3):
        run.step()
    assert float(run.model(**run.batch).loss.detach()) < start


# ------------------------------------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("estimator", EVERY)
def test_gradients_are_gone_and_those_that_were_there_stay(estimator):
    run = steps(make(estimator))
    first = next(iter(run.model.parameters()))
    first.grad = torch.ones_like(first)
    gradient = first.grad
    for _ in range(2):
        run.step()
    assert first.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(parameter.grad is None for parameter in run.model.parameters() if parameter is not first)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in run.model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("estimator", EVERY)
def test_an_objective_that_raises_leaves_everything_as_it_was(estimator):
    run = steps(make(estimator))
    run.step()
    digest = run.weights.digest()

    def objective(batch: Any) -> torch.Tensor:
        run.model(**batch)
        raise RuntimeError("the objective's own")

    run.session.objective = objective
    with pytest.raises(RuntimeError, match="the objective's own"):
        run.ask()
    assert run.weights.digest() == digest
    assert all(parameter.requires_grad and parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize("estimator", EVERY)
def test_an_objective_without_a_gradient_is_refused_in_a_sentence(estimator):
    run = steps(make(estimator))
    run.session.objective = lambda batch: run.model(**batch).logits.argmax(-1).float().mean()
    with pytest.raises(UserError, match=r"the objective has no gradient.*use estimator=central"):
        run.ask()


def test_gradients_exist_one_after_the_other():
    """While the step is written, no more than the tensor in hand and what autograd is about to hand over."""
    run = steps(make("backprop"), model=models.tiny_llama(), lr=0.0)
    asked = run.ask()
    alive: list[int] = []
    real = run.zo_optimizer._move

    def watched(*args: Any) -> None:
        alive.append(sum(p.grad is not None for p in run.model.parameters()))
        real(*args)

    run.zo_optimizer._move = watched
    run.zo_optimizer.apply(asked)
    assert len(alive) == len(run.weights.tensors)
    assert max(alive) <= 1


# --------------------------------------------------------------------------------------------- ZO below, gradient above


def test_hybrid_moves_above_by_the_gradient_and_below_by_the_queries():
    estimator = make("hybrid", backprop_blocks=1, num_directions=2, eps=3e-4)
    run, plain = (steps(estimator, lr=0.1, engine="layerwise") for _ in range(2))
    before, gradients = tensors_of(plain.model), gradients_of(plain.model, plain.batch)
    still = run.session.coordinates.backprop_names
    assert {name.split(".")[3] for name in still if "layers" in name} == {"2"}
    assert {name for name in still if "layers" not in name} == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }
    asked = run.ask()
    terms = list(asked.terms)
    run.zo_optimizer.apply(asked)
    after = tensors_of(run.model)
    for name in after:
        if name in still:
            torch.testing.assert_close(after[name], before[name] - 0.1 * gradients[name], rtol=1e-6, atol=1e-7)
        else:
            estimate = sum(c * run.z(d, name) for d, c in terms)
            torch.testing.assert_close(after[name], before[name] - 0.1 * estimate, rtol=1e-5, atol=1e-6)
    for direction, slope in zip(run.method.estimator.directions(5, 0), asked.projected_grads, strict=True):
        below = sum((gradients[n] * run.z(direction, n)).sum() for n in after if n not in still)
        assert float(slope) == pytest.approx(float(below), rel=0.05, abs=0.02)  # nothing above is perturbed


@pytest.mark.parametrize("engine", ["layerwise", "in_place", "side_path"])
def test_the_queries_of_hybrid_move_only_what_is_below(engine):
    run = steps(make("hybrid", eps=1e-2), engine=engine)
    direction = run.method.estimator.directions(5, 0)[0]
    points = run.method.estimator.points([direction])
    for _ in range(2):
        losses = run.session.losses(run.batch, points)
    other = models.tiny_opt()
    with torch.no_grad():
        for point, loss in zip(points, losses.tolist(), strict=True):
            for name, tensor in other.named_parameters():
                moves = name not in run.session.coordinates.backprop_names
                tensor.copy_(run.weights.tensors[name] + moves * point.scale * run.z(direction, name))
            assert loss == pytest.approx(float(other(**run.batch).loss), rel=1e-6)


def test_hybrid_keeps_no_graph_below():
    run = steps(make("hybrid"), model=models.tiny_llama())
    seen = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output if torch.is_tensor(output) else output[0]
            if torch.is_grad_enabled():
                seen[name] = value.requires_grad

        return see

    for index, layer in enumerate(run.model.model.layers):
        layer.register_forward_hook(hook(str(index)))
    run.step()
    assert seen == {"0": False, "1": False, "2": True}


def test_hybrid_is_refused_where_nothing_is_left_below():
    model = models.tiny_opt()
    LastBlocks(1).apply(model)
    with pytest.raises(UserError, match="leaves nothing below"):
        steps(make("hybrid"), model=model)


# -------------------------------------------------------------------------------------------------- long and short rows


def addax(**fields: Any) -> Steps:
    """A batch of one row of seven tokens, and two of four."""
    run = steps(make("addax", **{"long_tokens": 5, "zo_share": 0.25, "eps": 3e-4} | fields), lr=0.1, engine="layerwise")
    run.batch["attention_mask"][1:, :3] = 0
    run.batch["labels"][1:, :4] = -100
    return run


def part(batch: Any, where: slice) -> Any:
    return {name: value[where] for name, value in batch.items()}


def test_addax_adds_the_two_with_their_shares():
    run, plain = addax(), addax()
    before, gradients = tensors_of(plain.model), gradients_of(plain.model, part(run.batch, slice(1, 3)))
    direction = run.method.estimator.directions(5, 0)[0]
    asked = run.step()
    long = gradients_of(plain.model, part(run.batch, slice(0, 1)))
    slope = float(sum((long[n] * run.z(direction, n)).sum() for n in before))
    assert float(asked.projected_grads) == pytest.approx(slope, rel=0.05)
    slope = float(asked.projected_grads)
    for name, tensor in tensors_of(run.model).items():
        step = 0.25 * slope * run.z(direction, name) + 0.75 * gradients[name]
        torch.testing.assert_close(tensor, before[name] - 0.1 * step, rtol=1e-4, atol=1e-6)


def test_addax_with_rows_of_one_kind_takes_that_estimate_alone():
    short, first = addax(long_tokens=7), addax()
    gradients, before = gradients_of(first.model, first.batch), tensors_of(first.model)
    short.step()
    assert_close(tensors_of(short.model), {n: before[n] - 0.1 * g for n, g in gradients.items()})
    long, central = addax(long_tokens=3), Steps(make("central", eps=3e-4), model=models.tiny_opt(), lr=0.1)
    central.batch = long.batch
    long.step()
    central.step()
    assert_close(tensors_of(long.model), tensors_of(central.model))


@pytest.mark.parametrize("where", ["long", "short"])
def test_addax_with_a_loss_that_is_not_finite_moves_nothing(where):
    run = addax()
    run.step()
    digest, run.calls = run.weights.digest(), 0
    run.nan_at = 1 if where == "long" else 3
    assert not run.step().is_usable
    assert run.weights.digest() == digest
    assert all(parameter.grad is None for parameter in run.model.parameters())


# -------------------------------------------------------------------------------------------------- through the trainer


def rows(count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Rows with 2, 3, 4, ... labelled tokens, so that means of means are not the mean."""
    batch = models.batch_for(models.tiny_opt(), rows=count, length=9)
    for number in range(count):
        batch["labels"][number, : 7 - number % 6] = -100
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def option_rows(count: int = 12) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    draw = lambda n: torch.randint(4, models.VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    made_rows = []
    for number in range(count):
        head = draw(3 + number % 5)
        lengths = [1 + number % 2, 2]
        made_rows.append({"sequences": [head + draw(n) for n in lengths], "lengths": lengths, "label": number % 2})
    return made_rows


def arguments(kind: type, folder: Path, **given: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "dataloader_pin_memory": False,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "seed": 3,
    }
    return kind(**settings | given)


class EvalMode(Trainer):
    """The Trainer's own loop; with an objective, its loss."""

    objective: Any = None

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        model.eval()  # as in every query: no dropout
        if self.objective is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        return self.objective.loss(model, inputs)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["own", "options"])
def test_backprop_with_adamw_is_the_trainers_own_fine_tuning(objective, frozen, accumulated, tmp_path):
    """Token counts over micro-batches, decay groups, hidden states that are kept below: all as it does them."""
    trained = []
    for kind in (ZOConfig, TrainingArguments):
        model = models.tiny_opt()
        if frozen:
            LastBlocks(1).apply(model)
        given: dict[str, Any] = {"train_dataset": rows() if objective == "own" else option_rows()}
        if objective == "options":
            given["data_collator"] = OptionCollator(models.PAD)
        more = {"gradient_accumulation_steps": accumulated}
        if kind is ZOConfig:
            args = arguments(kind, tmp_path / "zo", keep_frozen_prefix=True, **more)
            named = {} if objective == "own" else {"objective": objective}
            trainer = ZOTrainer(model, args, estimator="backprop", optimizer=AdamW(weight_decay=0.1), **named, **given)
        else:
            args = arguments(kind, tmp_path / "hf", remove_unused_columns=objective == "own", **more)
            trainer = EvalMode(model, args, **given)
            trainer.objective = None if objective == "own" else Options()
            trainer.model_accepts_loss_kwargs &= objective == "own"
        trainer.train()
        trained.append(tensors_of(model))
        assert all(parameter.grad is None for parameter in model.parameters()) or kind is TrainingArguments
    assert_close(trained[0], without_noise(trained[1]), atol=2e-5)
    moved = [
        name for name, tensor in trained[0].items() if not torch.equal(tensor, tensors_of(models.tiny_opt())[name])
    ]
    assert moved
    assert not frozen or all("layers.2" in name or "norm" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("estimator", ["per_example", "svrg", "addax", "hybrid"])
def test_each_trains_and_counts_through_the_trainer(estimator, tmp_path):
    fields = {"addax": {"long_tokens": 8}}.get(estimator, {})
    args = arguments(ZOConfig, tmp_path, learning_rate=1e-3, weight_decay=0.0)
    trainer = ZOTrainer(models.tiny_opt(), args, train_dataset=rows(), estimator=make(estimator, **fields))
    trainer.train()
    progress = trainer.progress
    assert progress.updates == 4
    assert progress.num_queries == sum(trainer.method.queries_at(step) for step in range(4))


@pytest.mark.parametrize("objective", ["own", "options"])
def test_per_example_slopes_are_those_of_the_examples_own_losses(objective, tmp_path):
    """Not of their shares in the batch's token count."""
    given: dict[str, Any] = {"train_dataset": rows(3) if objective == "own" else option_rows(3)}
    if objective == "options":
        given |= {"objective": "options", "data_collator": OptionCollator(models.PAD)}
    args = arguments(ZOConfig, tmp_path, max_steps=1, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer = ZOTrainer(models.tiny_opt(), args, estimator="per_example", **given)
    trainer.train()
    model = models.tiny_opt()
    wanted = []
    for row in given["train_dataset"]:
        with torch.no_grad():
            if objective == "own":
                wanted.append(model(**{name: value.unsqueeze(0) for name, value in row.items()}).loss)
            else:
                wanted.append(Options().loss(model, OptionCollator(models.PAD)([row])))
    assert trainer.last_step.losses.shape == (2, 3)
    torch.testing.assert_close(trainer.last_step.losses.mean(0), torch.stack(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_parts_of_a_batch_have_losses_of_their_own_in_the_trainer(accumulated, tmp_path):
    """What addax backpropagates is the mean over the short rows' tokens, not their share of the batch's."""
    data = rows(6)
    for row in data[:2]:
        row["attention_mask"][:2] = 0
        row["labels"][:3] = -100
    args = arguments(
        ZOConfig,
        tmp_path,
        max_steps=1,
        learning_rate=0.1,
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=6 // accumulated,
        gradient_accumulation_steps=accumulated,
    )
    estimator = make("addax", long_tokens=7, zo_share=0.0)
    trainer = ZOTrainer(models.tiny_opt(), args, train_dataset=data, estimator=estimator)
    trainer.train()
    plain = models.tiny_opt()
    short = {name: torch.stack([row[name][2:] for row in data[:2]]) for name in data[0]}
    gradients, before = gradients_of(plain, short), tensors_of(plain)
    assert_close(tensors_of(trainer.model), {n: before[n] - 0.1 * g for n, g in gradients.items()})


def test_anchors_average_batches_by_their_own_means_in_the_trainer(tmp_path):
    args = arguments(ZOConfig, tmp_path, max_steps=1, learning_rate=0.0)
    estimator = make("svrg", anchor_batches=4, eps=1e-4)
    trainer = ZOTrainer(models.tiny_opt(), args, train_dataset=rows(), estimator=estimator)
    trainer.train()
    model, losses = models.tiny_opt(), []
    drawn = torch.Generator().manual_seed(step_seed(args.seed, 0))
    chosen = torch.randperm(12, generator=drawn).tolist()
    for start in range(0, 12, 3):
        batch = {name: torch.stack([rows()[i][name] for i in chosen[start : start + 3]]) for name in rows()[0]}
        with torch.no_grad():
            losses.append(float(model(**batch).loss))
    assert float(trainer.last_step.losses.mean()) == pytest.approx(sum(losses) / 4, rel=1e-4)


def test_clipping_projected_gradients_is_refused_with_a_backward_pass(tmp_path):
    args = arguments(ZOConfig, tmp_path, max_grad_norm=0.5)
    with pytest.raises(UserError, match="max_grad_norm is about projected gradients"):
        ZOTrainer(models.tiny_opt(), args, train_dataset=rows(), estimator="backprop")
