"""ZOTrainer: every kind of model learns through it, and what the Trainer promises still holds."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tests import models
from zoft import ZOConfig, ZOTrainer
from zoft.errors import NonFiniteLossError, UserError
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.estimators.svrg import SVRG
from zoft.journal import file as files
from zoft.noise.direction import Direction
from zoft.noise.source import CounterNoise
from zoft.optimizers.adam import Adam
from zoft.optimizers.momentum import Momentum
from zoft.optimizers.muon import Muon
from zoft.optimizers.replay_adam import ReplayAdam
from zoft.optimizers.sgd import SGD
from zoft.subspaces.activation import Activation
from zoft.subspaces.full import Full
from zoft.subspaces.left import Left
from zoft.subspaces.sparse import Sparse
from zoft.trainer.config import _MEANINGLESS
from zoft.weights.tensors import Weights

Rows = list[dict[str, Any]]


def llama_head(seed: int = 0, **fields: Any) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "num_labels": 3}
    return models._build("LlamaForSequenceClassification", "LlamaConfig", seed, small | more | fields, "sdpa")


FAMILIES: dict[str, Callable[..., Any]] = models.EVERY | {"llama_head": llama_head}


def rows_for(model: Any, count: int, *, seed: int = 0, length: int = 7) -> Rows:
    batch = models.batch_for(model, rows=count, length=length, seed=seed)
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def unequal_rows(count: int) -> Rows:
    """Causal LM rows with 1, 2, 3, ... labelled tokens."""
    rows = rows_for(models.tiny_llama(), count, length=12)
    for number, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 11 - number % 8] = -100
    return rows


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ZOTrainer]:
    """A quiet trainer on the CPU; keys of ZOConfig and of ZOTrainer alike."""
    fields = {field.name for field in dataclasses.fields(ZOConfig)}

    def make_one(model: Any, rows: Rows | None = None, cls: type = ZOTrainer, **kwargs: Any) -> ZOTrainer:
        given = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
        if "budget_queries" not in given and "num_train_epochs" not in given:
            given.setdefault("max_steps", 3)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "dataloader_pin_memory": False,
        }
        if getattr(kwargs.get("optimizer"), "learning_rate", None) is None:
            defaults["learning_rate"] = 1e-3
        args = kwargs.pop("args", None) or ZOConfig(**(defaults | given))
        if rows is None and not isinstance(model, str):
            rows = rows_for(model, 12)
        return cls(model, args, train_dataset=rows, **kwargs)

    return make_one


def digest(model: Any) -> str:
    return Weights(model).digest()


def lines(trainer: ZOTrainer, key: str) -> list[Any]:
    return [line[key] for line in trainer.state.log_history if key in line and "train_runtime" not in line]


def all_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# ---- every kind of model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_all_its_weights_on_its_own_loss(family: str, make: Callable[..., ZOTrainer]):
    model = FAMILIES[family]()
    rows = rows_for(model, 4)
    with torch.no_grad():
        clean = float(model(**models.batch_for(model, rows=4)).loss)
    if family == "gpt2":
        clean *= 6 / 7  # the Trainer counts this family's labels without the shift: its own loss comes out so, too
    before = all_tensors(model)
    trainer = make(model, rows, estimator=OneSided(eps=1e-3), max_steps=2)
    trainer.train()
    assert lines(trainer, "loss")[0] == pytest.approx(clean, abs=1e-5)
    after = all_tensors(model)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still
    assert trainer.progress.num_queries == 4


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        (family, adapter)
        for family in FAMILIES
        for adapter in ("lora", "prefix", "prompt")
        if family != "roberta" or adapter == "lora"  # peft has neither prefix nor prompt for masked LMs
    ],
)
def test_only_the_adapter_moves(family: str, adapter: str, make: Callable[..., ZOTrainer]):
    import peft

    from zoft.lm.models.peft.base import task_type_of

    model = FAMILIES[family]()
    task = task_type_of(model)
    config = {
        "lora": lambda: peft.LoraConfig(task_type=task, r=2, lora_alpha=4),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
        "prompt": lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    }[adapter]()
    rows = rows_for(model, 8)
    base = digest(model)
    trainer = make(model, rows, eval_dataset=rows, peft_config=config, learning_rate=1e-2)
    names = list(Weights(trainer.model).tensors)
    assert names
    assert len(names) < len(list(trainer.model.parameters()))
    before = all_tensors(trainer.model)
    trainer.train()
    after = all_tensors(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(names)
    assert base != digest(trainer.model)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_zofts_own_adapters(name: str, make: Callable[..., ZOTrainer]):
    from zoft.component import create

    model = models.tiny_llama()
    rows = rows_for(model, 8)
    wrapped = create("peft", name, "none").wrap(model, seed=0)
    before = digest(wrapped)
    make(wrapped, rows).train()
    assert digest(wrapped) != before


def test_the_adapters_first_weights_follow_the_seed(make: Callable[..., ZOTrainer]):
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=2)
    digests = [
        digest(make(models.tiny_llama(), seed=seed, peft_config=copy.deepcopy(config)).model) for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_prefix_projection_is_refused(make: Callable[..., ZOTrainer]):
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True)
    with pytest.raises(UserError, match="prefix_projection"):
        make(models.tiny_llama(), peft_config=config)


def test_it_learns(make: Callable[..., ZOTrainer]):
    """One layer, random weights: which of two tokens stands in the row decides the label."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_labels": 2}
    model = models.tiny_bert_classifier(initializer_range=0.2, **config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, models.VOCAB, (256, 6), generator=generator)
    labels = torch.randint(0, 2, (256,), generator=generator)
    ids[:, 2] = 4 + labels
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]

    def accuracy(output: Any) -> dict[str, float]:
        return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}

    trainer = make(
        model,
        rows[:192],
        eval_dataset=rows[192:],
        compute_metrics=accuracy,
        estimator=Central(eps=1e-3, num_directions=2),
        learning_rate=1e-2,
        per_device_train_batch_size=64,
        max_steps=150,
        logging_steps=25,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.75
    assert after > 0.9
    assert lines(trainer, "loss")[-1] < lines(trainer, "loss")[0] / 2


# ---- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "smoothing"),
    # Label smoothing in the Trainer is a mean per micro-batch: unequal token counts cannot come out equal there.
    [
        ("llama", 0.0),
        ("bert", 0.0),
        ("llama_head", 0.0),
        ("t5", 0.0),
        ("roberta", 0.0),
        ("bert", 0.1),
        ("roberta", 0.1),
    ],
)
def test_accumulation_is_one_large_batch(family: str, smoothing: float, make: Callable[..., ZOTrainer]):
    build = FAMILIES[family]
    rows = unequal_rows(24) if family == "llama" else rows_for(build(), 24)
    results = []
    for size, steps in ((8, 1), (2, 4), (4, 2)):
        model = build()
        trainer = make(
            model,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            estimator=Central(eps=1e-2),  # so large that rounding does not show
            max_steps=4,
            label_smoothing_factor=smoothing,
            label_names=["labels"],
            seed=3,
        )
        trainer.train()
        results.append((lines(trainer, "loss"), all_tensors(model), trainer.progress.num_tokens))
    (losses, weights, tokens), *others = results
    for other_losses, other_weights, other_tokens in others:
        assert other_losses == pytest.approx(losses, rel=1e-6)
        assert max(float((weights[n] - other_weights[n]).abs().max()) for n in weights) < 1e-6
        assert other_tokens == tokens


def test_a_first_micro_batch_without_labels_says_nothing_about_scaling(make: Callable[..., ZOTrainer]):
    """Its loss is zero whatever it is divided by: that must not be taken for a loss that ignores the token count."""
    rows = rows_for(models.tiny_llama(), 8)
    for row in rows[:4]:
        row["labels"] = torch.full_like(row["labels"], -100)
    options = {"train_sampling_strategy": "sequential", "max_steps": 2, "estimator": Central(eps=1e-2)}
    losses = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = make(
            models.tiny_llama(), rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
        )
        trainer.train()
        assert trainer.model_accepts_loss_kwargs
        assert trainer.progress.num_skipped == 0
        losses.append(lines(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_seconds_are_wall_time(make: Callable[..., ZOTrainer]):
    """Everything between the first and the last step counts, also what is neither a query nor inside training_step."""

    class Slow(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.05)

    trainer = make(models.tiny_llama(), max_steps=3, callbacks=[Slow()])
    trainer.train()
    assert trainer.progress.seconds - trainer.progress.seconds_forward >= 0.15
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert row["seconds_other"] >= 0.15


def test_the_logged_loss_of_accumulated_steps_is_the_models_own(make: Callable[..., ZOTrainer]):
    """The Trainer itself multiplies a classification head's loss by the number of micro-batches."""
    model = models.tiny_bert_classifier()
    with torch.no_grad():
        model_loss = float(model(**models.batch_for(model, rows=12)).loss)
    trainer = make(
        model,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        estimator="one_sided",
        learning_rate=0.0,
        max_steps=1,
    )
    trainer.train()
    assert lines(trainer, "loss") == [pytest.approx(model_loss, abs=1e-6)]


def test_a_last_step_with_fewer_micro_batches(make: Callable[..., ZOTrainer]):
    """10 rows as 4 + 4 + 2: the incomplete step is the mean over its two rows."""
    rows = rows_for(models.tiny_bert_classifier(), 10)
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        trainer = make(
            models.tiny_bert_classifier(),
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            num_train_epochs=2,
            learning_rate=1e-2,
        )
        trainer.train()
        losses.append(lines(trainer, "loss"))
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


# ---- the step itself -------------------------------------------------------------------------------------------------


def by_hand(model: Any, row: dict[str, Any], lrs: list[float], decay: float, eps: float, seed: int) -> dict[str, Any]:
    """Central differences written out, one direction, one row."""
    batch = {name: value.unsqueeze(0) for name, value in row.items()}
    parameters = dict(model.named_parameters())
    noise = CounterNoise("gaussian", {name: p.numel() for name, p in parameters.items()})
    with torch.no_grad():
        for step, lr in enumerate(lrs):
            clean = {name: p.clone() for name, p in parameters.items()}
            z = {
                name: noise.draw(Direction(seed, step, 0), name, 0, p.numel(), p.device, p.dtype).view(p.shape)
                for name, p in parameters.items()
            }
            losses = []
            for sign in (1, -1):
                for name, p in parameters.items():
                    p.copy_(clean[name] + sign * eps * z[name])
                losses.append(float(model(**batch).loss))
            g = (losses[0] - losses[1]) / (2 * eps)
            for name, p in parameters.items():
                none = name.endswith("bias") or "norm" in name.lower()
                p.copy_(clean[name] - lr * (g * z[name] + (0 if none else decay) * clean[name]))
    return {name: p.clone() for name, p in parameters.items()}


@pytest.mark.parametrize(
    ("scheduler", "lrs"), [("constant", [1e-2, 1e-2, 1e-2, 1e-2]), ("linear", [1e-2, 7.5e-3, 5e-3, 2.5e-3])]
)
@pytest.mark.parametrize("engine", ["layerwise", "in_place"])
def test_schedule_and_decay_by_hand(scheduler: str, lrs: list[float], engine: str, make: Callable[..., ZOTrainer]):
    model = models.tiny_bert_classifier()
    rows = rows_for(model, 1)
    expected = by_hand(copy.deepcopy(model), rows[0], lrs, decay=0.5, eps=1e-2, seed=5)
    trainer = make(
        model,
        rows,
        per_device_train_batch_size=1,
        max_steps=4,
        lr_scheduler_type=scheduler,
        learning_rate=1e-2,
        weight_decay=0.5,
        estimator=Central(eps=1e-2),
        engine=engine,
        seed=5,
    )
    trainer.train()
    assert lines(trainer, "learning_rate") == pytest.approx(lrs)
    for name, tensor in all_tensors(model).items():
        assert torch.allclose(tensor, expected[name], atol=2e-6), name


def test_decay_alone_leaves_norms_and_biases(make: Callable[..., ZOTrainer]):
    """A loss that cannot change leaves only the decay."""

    class Flat(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, **kwargs) * 0.0

    model = models.tiny_bert_classifier()
    before = all_tensors(model)
    make(model, cls=Flat, optimizer=SGD(learning_rate=0.1, weight_decay=0.5), max_steps=1).train()
    for name, tensor in all_tensors(model).items():
        exempt = name.endswith("bias") or "LayerNorm" in name
        assert torch.allclose(tensor, before[name] * (1.0 if exempt else 0.95), atol=1e-7), name


def test_max_grad_norm_clips_each_projected_gradient(make: Callable[..., ZOTrainer]):
    model, free = models.tiny_llama(), models.tiny_llama()
    start = all_tensors(model)
    clipped = make(model, max_grad_norm=1e-3, max_steps=1, learning_rate=1.0)
    clipped.train()
    other = make(free, max_steps=1, learning_rate=1.0)
    other.train()
    g = lines(other, "projected_grad")[0]
    assert g > 1e-2
    assert lines(clipped, "projected_grad") == [g]  # before clipping, as the Trainer logs grad_norm
    assert lines(clipped, "grad_norm") == [g]
    for name, tensor in all_tensors(model).items():
        moved, freely = tensor - start[name], dict(free.named_parameters())[name].detach() - start[name]
        assert torch.allclose(moved * (g / 1e-3), freely, rtol=1e-2, atol=2e-3), name


@pytest.mark.parametrize("engine", ["layerwise", "in_place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_learning_rate_no_change(dtype: torch.dtype, engine: str, make: Callable[..., ZOTrainer]):
    model = models.tiny_llama().to(dtype)
    before = digest(model)
    trainer = make(model, learning_rate=0.0, max_steps=10, engine=engine, estimator=Central(eps=1e-2))
    trainer.train()
    assert digest(model) == before
    assert trainer.progress.updates == 10


def test_dropout_is_off(make: Callable[..., ZOTrainer]):
    model = models.tiny_bert_classifier(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    with torch.no_grad():
        clean = float(model(**models.batch_for(model, rows=1)).loss)
    trainer = make(
        model,
        rows_for(model, 1),
        estimator="one_sided",
        learning_rate=0.0,
        per_device_train_batch_size=1,
        max_steps=4,
        callbacks=[_TrainMode()],
    )
    trainer.train()
    assert lines(trainer, "loss") == [clean] * 4


class _TrainMode(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].train()


# ---- what a log line says --------------------------------------------------------------------------------------------


def test_every_log_line_counts(make: Callable[..., ZOTrainer]):
    model = models.tiny_llama()
    rows = rows_for(model, 12)
    trainer = make(
        model,
        rows,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        max_steps=4,
        estimator=OneSided(num_directions=3, eps=1e-2),
    )
    trainer.train()
    history = trainer.state.log_history
    assert len(history) == 8
    for line in history:
        assert line["num_queries"] == 4 * line["step"]
        assert line["num_tokens"] == line["num_queries"] * 4 * 7
        assert line["seconds"] >= 0
    for line in history:
        if "loss" in line:
            assert line["eps"] == 1e-2
            assert line["projected_grad"] > 0
            assert line["seconds"] == pytest.approx(line["seconds_forward"] + line["seconds_other"])
            assert 0 < line["seconds_forward"] <= line["seconds"]
            assert line["num_skipped_steps"] == 0


@pytest.mark.parametrize(
    ("schedule", "shares"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.8, 0.6, 0.4]), ("tied", [1, 0.75, 0.5, 0.25])]
)
def test_the_logged_eps_is_that_of_the_step(schedule: str, shares: list[float], make: Callable[..., ZOTrainer]):
    """And of the points that were queried; tied, it is to the logged learning rate as at the start."""
    estimator = Central(eps=1e-2, eps_schedule=schedule, eps_end=0.2 if schedule == "linear" else Central.eps_end)
    trainer = make(models.tiny_llama(), estimator=estimator, max_steps=4, lr_scheduler_type="linear")
    asked: list[float] = []
    trainer.create_optimizer()
    real = trainer.zo_optimizer.session.losses

    def losses(batch: Any, points: Any) -> Any:
        asked.append(max(point.scale for point in points))
        return real(batch, points)

    trainer.zo_optimizer.session.losses = losses  # type: ignore[method-assign]
    trainer.train()
    assert lines(trainer, "eps") == pytest.approx([1e-2 * share for share in shares])
    assert asked == lines(trainer, "eps")
    if schedule == "tied":
        rates = lines(trainer, "learning_rate")
        assert [eps / rate for eps, rate in zip(asked, rates, strict=True)] == pytest.approx([10.0] * 4)


def test_the_logged_rate_is_scaled_with_the_directions_where_that_is_asked_for(make: Callable[..., ZOTrainer]):
    for scaled, rate in ((False, 1e-3), (True, 3e-3)):
        optimizer = SGD(learning_rate=1e-3, scale_with_directions=scaled)
        estimator = Central(num_directions=3, eps_schedule="tied")
        trainer = make(models.tiny_llama(), estimator=estimator, optimizer=optimizer)
        trainer.train()
        assert lines(trainer, "learning_rate") == pytest.approx([rate] * 3)
        assert lines(trainer, "eps") == pytest.approx([1e-3] * 3)


def test_the_mean_loss_between_log_lines(make: Callable[..., ZOTrainer]):
    each = make(models.tiny_llama(), max_steps=6)
    each.train()
    every_third = make(models.tiny_llama(), max_steps=6, logging_steps=3)
    every_third.train()
    losses = lines(each, "loss")
    assert lines(every_third, "loss") == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_padding_is_not_counted(make: Callable[..., ZOTrainer]):
    rows = rows_for(models.tiny_llama(), 4)
    for row in rows:
        row["attention_mask"] = torch.tensor([1] * 5 + [0] * 2)
    trainer = make(models.tiny_llama(), rows, max_steps=1)
    trainer.train()
    assert trainer.progress.num_tokens == 2 * 4 * 5


@pytest.mark.parametrize(
    ("estimator", "queries", "steps"),
    [(Central(), 10, 5), (Central(num_directions=3), 20, 3), (OneSided(num_directions=4), 24, 4)],
)
def test_the_budget_decides_when_to_stop(estimator: Any, queries: int, steps: int, make: Callable[..., ZOTrainer]):
    trainer = make(models.tiny_llama(), budget_queries=queries, estimator=estimator)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps == steps
    assert trainer.progress.num_queries == steps * estimator.num_queries <= queries


def test_forward_gradient_counts_two_a_direction(make: Callable[..., ZOTrainer]):
    trainer = make(models.tiny_llama(attn="eager"), budget_queries=9, estimator="forward_gradient")
    trainer.train()
    assert trainer.state.global_step == 4
    assert lines(trainer, "eps") == [0.0] * 4


# ---- the Trainer's promises ------------------------------------------------------------------------------------------


class Witness(TrainerCallback):
    """Every event with the digest of the weights at it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: list[tuple[str, str]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name != "on_init_end":
            model, seen = self.model, self.seen
            return lambda *_, **__: seen.append((name, digest(model)))
        return super().__getattribute__(name)


@pytest.mark.parametrize("engine", ["layerwise", "in_place"])
def test_callbacks_come_in_order_and_see_clean_weights(engine: str, make: Callable[..., ZOTrainer]):
    model = models.tiny_llama()
    start = digest(model)
    witness = Witness(model)
    trainer = make(
        model,
        eval_dataset=rows_for(model, 4),
        eval_strategy="steps",
        eval_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=2,
        callbacks=[witness],
        engine=engine,
    )
    trainer.train()
    step = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log"]
    step += ["prediction_step", "log", "evaluate"]
    expected = ["train_begin", "epoch_begin", *step, *step, "epoch_end", "log", "train_end"]
    assert [name.removeprefix("on_") for name, _ in witness.seen] == expected
    changes = [
        name for (_, before), (name, after) in zip(witness.seen, witness.seen[1:], strict=False) if before != after
    ]
    assert changes == ["on_optimizer_step"] * 2
    assert witness.seen[0][1] == start
    assert witness.seen[-1][1] == digest(model)


def test_the_best_model_is_loaded_at_the_end(make: Callable[..., ZOTrainer], tmp_path: Path):
    """The learning rate is far too high: the first checkpoint is the best one."""
    model = models.tiny_bert_classifier()
    rows = rows_for(model, 12)
    trainer = make(
        model,
        rows,
        eval_dataset=rows,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=3,
        learning_rate=1e-4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        callbacks=[_Explode()],
    )
    trainer.train()
    evaluations = lines(trainer, "eval_loss")
    assert evaluations[0] < min(evaluations[1:])
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[0], abs=1e-6)


class _Explode(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 1.0


RESUMED = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16, "estimator": Central(eps=1e-2)},
    "lora": {"lora": True},
    "momentum": {"optimizer": Momentum(beta=0.5)},
    "adam": {"optimizer": Adam(), "estimator": Central(num_directions=2)},
    "adam_bf16": {"optimizer": Adam(), "dtype": torch.bfloat16, "estimator": Central(eps=1e-2)},
    "lora_adam": {"optimizer": Adam(), "lora": True},
    "rademacher": {"subspace": Full(law="rademacher")},
    "sphere": {"subspace": Full(law="sphere")},
    "one_sided": {"estimator": OneSided(num_directions=3)},
    "forward_gradient": {"estimator": "forward_gradient"},
    "torch_sequential": {"estimator": Central(noise="torch_sequential")},
    "in_place": {"engine": "in_place"},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "activation": {"subspace": Activation(rank=2), "estimator": OneSided(num_directions=2), "optimizer": Adam()},
    "activation_oja": {"subspace": Activation(rank=4, basis="oja", basis_columns=8, shared_columns=2)},
    "sparse": {"subspace": Sparse(choose="magnitude", interval=3)},
    "svrg": {"estimator": SVRG(interval=3, anchor_batches=2)},
    "one_point": {"estimator": "one_point"},
    "kalman": {"estimator": OneSided(num_directions=2), "weighting": "kalman"},
    "hessian": {"estimator": "three_point", "optimizer": "hessian"},
    "replay_adam": {"optimizer": ReplayAdam(history=3)},
    "muon": {
        "subspace": Left(rank=2, interval=3),
        "estimator": OneSided(num_directions=2),
        "optimizer": Muon(method="power", top_k=2, beta=0.5),
    },
}
"""Name -> what differs from the plain run: checkpoints lie between refreshes, anchors and the ends of records."""


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_is_the_same_to_the_bit(case: str, make: Callable[..., ZOTrainer], tmp_path: Path):
    given = dict(RESUMED[case])
    dtype, lora = given.pop("dtype", torch.float32), given.pop("lora", False)
    rows = rows_for(models.tiny_llama(), 10)

    def one(output_dir: str, *, other_weights: bool = False) -> ZOTrainer:
        model = models.tiny_llama(seed=7 if other_weights and not lora else 0, attn="eager").to(dtype)
        extra: dict[str, Any] = {}
        if lora:
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4)
        return make(
            model,
            rows,
            eval_dataset=rows[:4],
            output_dir=str(tmp_path / output_dir),
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            lr_scheduler_type="linear",
            weight_decay=0.1,
            learning_rate=1e-2,
            **(extra | given),
        )

    whole = one("whole")
    whole.train()
    resumed = one("resumed", other_weights=True)
    torch.manual_seed(99)  # another process has another global state
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert digest(resumed.model) == digest(whole.model)
    skipped = {"seconds", "seconds_forward", "seconds_other"}
    skipped |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}

    def history_of(trainer: ZOTrainer) -> list[dict[str, Any]]:
        history = [line for line in trainer.state.log_history if line["step"] > 4 and "train_runtime" not in line]
        return [{key: value for key, value in line.items() if key not in skipped} for line in history]

    assert len(history_of(whole)) == 4
    assert history_of(resumed) == history_of(whole)
    for name, state in whole.zo_optimizer.moments.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, resumed.zo_optimizer.moments[name][key])


def test_steps_that_the_journal_knows_count_the_operations_of_their_queries(make: Callable[..., ZOTrainer]):
    rows, totals = rows_for(models.tiny_llama(), 6), []
    for resume in (None, True):
        trainer = make(models.tiny_llama(), rows, max_steps=5, estimator=SVRG(interval=3, anchor_batches=2))
        trainer.train(resume_from_checkpoint=resume)
        totals.append(trainer.state.total_flos)
        assert trainer.last_step.from_journal == bool(resume)
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize("steps", [5, 6])
def test_a_finished_run_resumed_is_finished(steps: int, make: Callable[..., ZOTrainer], tmp_path: Path):
    """In the middle of an epoch the Trainer alone would take one step more."""

    def one() -> ZOTrainer:
        return make(models.tiny_llama(), max_steps=steps, save_strategy="steps", save_steps=steps)

    whole = one()
    whole.train()
    again = one()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert again.progress.num_queries == 2 * steps
    assert digest(again.model) == digest(whole.model)


def test_saved_model_loads(make: Callable[..., ZOTrainer], tmp_path: Path):
    from transformers import AutoModelForCausalLM

    trainer = make(models.tiny_llama())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert digest(loaded) == digest(trainer.model)


def test_a_second_train_takes_new_directions(make: Callable[..., ZOTrainer]):
    model = models.tiny_llama()
    trainer = make(model, rows_for(model, 1), per_device_train_batch_size=1, learning_rate=0.0, max_steps=3)
    trainer.train()
    first = lines(trainer, "projected_grad")
    trainer.train()
    second = lines(trainer, "projected_grad")
    assert len(set(first + second)) == 6
    assert trainer.progress.num_queries == 12


def test_global_random_states_are_left_alone(make: Callable[..., ZOTrainer]):
    from peft import LoraConfig

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    model = models.tiny_llama()
    rows = rows_for(model, 12)
    torch.manual_seed(123)
    random.seed(4)
    numpy.random.seed(5)
    before = states()
    trainer = make(model, rows, eval_dataset=rows, peft_config=LoraConfig(task_type="CAUSAL_LM", r=2))
    assert states() == before
    trainer.train()
    assert states() == before
    trainer.evaluate()
    assert states() == before
    trainer.predict(rows)
    assert states() == before


def seen_rows(trainer: ZOTrainer) -> list[int]:
    """The first token of every row in the order they were trained on."""
    seen: list[int] = []
    collate = trainer.data_collator

    def spy(rows: Rows) -> Any:
        batch = collate(rows)
        seen.extend(batch["input_ids"][:, 0].tolist())
        return batch

    trainer.data_collator = spy
    trainer.train()
    return seen


def test_the_order_of_the_rows_follows_the_seed_alone(make: Callable[..., ZOTrainer]):
    rows = rows_for(models.tiny_llama(), 24)
    for number, row in enumerate(rows):
        row["input_ids"][0] = 4 + number
    orders = []
    for state, given in (
        (1, {}),
        (2, {}),
        (3, {"estimator": OneSided(num_directions=3), "optimizer": "adam", "engine": "in_place"}),
        (4, {"estimator": "forward_gradient"}),
        (5, {"seed": 8}),
        (6, {"data_seed": 8}),
    ):
        torch.manual_seed(state)
        orders.append(seen_rows(make(models.tiny_llama(attn="eager"), rows, max_steps=8, **given)))
    assert orders[0] == orders[1] == orders[2] == orders[3]
    assert orders[0] != orders[4]
    assert orders[4] == orders[5]
    assert sorted(orders[0][:24]) == list(range(4, 28))
    assert orders[0][:24] != orders[0][24:]


def test_the_seed_decides_everything(make: Callable[..., ZOTrainer]):
    digests = []
    for state, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(state)
        trainer = make(models.tiny_llama(), seed=seed)
        trainer.train()
        digests.append(digest(trainer.model))
    assert digests[0] == digests[1] != digests[2]


# ---- losses that are not finite --------------------------------------------------------------------------------------


class Faulty(ZOTrainer):
    """Some queries of some steps answer something else."""

    faults: dict[tuple[int, int], float]  # (step, query of the step) -> loss; step -1: every step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = 0
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if return_outputs or not hasattr(self, "asked"):
            return loss
        fault = self.faults.get((self.progress.steps, self.asked), self.faults.get((-1, self.asked)))
        self.asked += 1
        return loss if fault is None else loss * 0 + fault


FAULTS = {
    "plus": (Central(), {0: math.nan}),
    "minus": (Central(), {1: math.nan}),
    "plus_inf": (Central(), {0: math.inf}),
    "minus_inf": (Central(), {1: -math.inf}),
    "both": (Central(), {0: math.nan, 1: math.nan}),
    "both_inf": (Central(), {0: math.inf, 1: math.inf}),
    "one_of_four": (Central(num_directions=2), {3: math.nan}),
    "clean": (OneSided(num_directions=2), {0: math.nan}),
    "clean_inf": (OneSided(num_directions=2), {0: math.inf}),
    "shared": (OneSided(num_directions=2), {2: math.nan}),
    "finite_but_the_difference_is_not": (Central(), {0: 3e38, 1: -3e38}),
}


@pytest.mark.parametrize("engine", ["layerwise", "in_place"])
@pytest.mark.parametrize("case", FAULTS)
def test_a_step_with_a_bad_loss_moves_nothing(case: str, engine: str, make: Callable[..., ZOTrainer]):
    estimator, bad = FAULTS[case]
    model = models.tiny_llama()
    witness = Witness(model)
    trainer = make(
        model, cls=Faulty, estimator=estimator, engine=engine, max_steps=4, optimizer="adam", callbacks=[witness]
    )
    trainer.faults = {(1, query): loss for query, loss in bad.items()}
    trainer.train()
    digests = [seen for name, seen in witness.seen if name == "on_step_end"]
    assert digests[1] == digests[0]
    assert len(set(digests)) == 3
    assert trainer.progress.num_skipped == 1
    assert trainer.progress.updates == 3
    assert lines(trainer, "num_skipped_steps") == [0, 1, 1, 1]
    assert lines(trainer, "num_queries")[-1] == 4 * estimator.num_queries
    losses = lines(trainer, "loss")
    assert all(math.isfinite(losses[i]) and losses[i] > 1 for i in (0, 2, 3))
    if case in ("shared", "finite_but_the_difference_is_not"):  # the clean loss, or the mean, is a number all the same
        assert losses[1] == pytest.approx(4.2 if case == "shared" else 0.0, abs=0.5)
    else:
        assert math.isnan(losses[1])
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_too_many_bad_steps_stop_the_run(loss: float, make: Callable[..., ZOTrainer]):
    model = models.tiny_llama()
    before = digest(model)
    trainer = make(model, cls=Faulty, max_steps=50, max_skipped_steps=3)
    trainer.faults = {(-1, 0): loss, (-1, 1): loss}
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        trainer.train()
    assert digest(model) == before
    assert trainer.progress.steps == 3
    assert all(math.isnan(value) for value in lines(trainer, "loss"))


def test_bad_steps_apart_do_not_stop_the_run(make: Callable[..., ZOTrainer]):
    trainer = make(models.tiny_llama(), cls=Faulty, max_steps=6, max_skipped_steps=2)
    trainer.faults = {(step, 0): math.nan for step in (0, 2, 4)}
    trainer.train()
    assert trainer.progress.num_skipped == 3
    assert trainer.progress.updates == 3


def test_a_bad_loss_among_others_does_not_hide_them(make: Callable[..., ZOTrainer]):
    trainer = make(models.tiny_llama(), cls=Faulty, max_steps=4, logging_steps=4)
    trainer.faults = {(1, 0): math.nan}
    trainer.train()
    assert lines(trainer, "loss")[0] == pytest.approx(4.2, abs=0.5)  # log 64: the mean of the three others


def test_a_bad_first_batch_does_not_settle_the_scaling(make: Callable[..., ZOTrainer]):
    """With accumulation, whether the loss uses the token count is found out on a batch that shows it."""
    losses = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make(
            models.tiny_bert_classifier(),
            rows_for(models.tiny_bert_classifier(), 24),
            cls=Poisoned,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
        )
        trainer.train()
        losses.append(lines(trainer, "loss"))
    assert math.isnan(losses[0][0])
    assert losses[1][1:] == pytest.approx(losses[0][1:], abs=1e-6)


class Poisoned(ZOTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        return loss * math.nan if self.progress.steps == 0 else loss


# ---- what is refused -------------------------------------------------------------------------------------------------

MEANINGLESS_VALUES: dict[str, list[Any]] = {
    "activation_checkpointing": [True],
    "gradient_checkpointing": [True],
    "activation_checkpointing_kwargs": [{"every_n_layers": 2}],
    "gradient_checkpointing_kwargs": [{"use_reentrant": False}],
    "neftune_noise_alpha": [5.0],
    "fp16": [True],
    "bf16_full_eval": [True],
    "fp16_full_eval": [True],
    "fsdp_config": [{"min_num_params": 1}],
    "resume_from_checkpoint": ["runs/earlier"],
    "fsdp": ["full_shard", True],
    "deepspeed": [{"train_batch_size": 4}, "ds.json"],
    "optim": ["sgd", "adafactor"],
    "optim_args": ["a=1"],
    "optim_target_modules": ["all-linear"],
    "adam_beta1": [0.5, 0.0],
    "adam_beta2": [0.5, 0],
    "adam_epsilon": [1e-3, 0.0],
    "torch_empty_cache_steps": [4],
    "ddp_find_unused_parameters": [True],
    "ddp_bucket_cap_mb": [25],
    "ddp_broadcast_buffers": [True],
    "ddp_static_graph": [True],
}


def test_every_meaningless_setting_exists_and_is_tried():
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(_MEANINGLESS) == set(MEANINGLESS_VALUES)
    assert set(_MEANINGLESS) <= stock


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, vs in MEANINGLESS_VALUES.items() for value in vs])
def test_meaningless_settings_are_refused(name: str, value: Any, tmp_path: Path):
    with pytest.raises(UserError, match=f"^{name}={value!r}".replace("{", r"\{").replace("}", r"\}")) as caught:
        ZOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], **{name: value})
    assert _MEANINGLESS[name] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_meaningless_settings_of_plain_arguments_are_refused(make: Callable[..., ZOTrainer], tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], optim="sgd")
    with pytest.raises(UserError, match="optim="):
        make(models.tiny_llama(), args=args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": lambda: Central(eps=0.0)}, "central.eps must be > 0"),
        ({"estimator": lambda: Central(eps=-1.0)}, "central.eps must be > 0"),
        ({"estimator": lambda: OneSided(eps=0.0)}, "one_sided.eps must be > 0"),
        ({"estimator": lambda: Central(num_directions=0)}, "central.num_directions must be at least 1"),
        ({"estimator": lambda: Central(num_directions=-3)}, "num_directions must be at least 1"),
        ({"estimator": lambda: "centrall"}, "Did you mean central"),
        ({"optimizer": lambda: "adm"}, "Did you mean adam"),
        ({"optimizer": lambda: SGD(learning_rate=-1.0)}, "sgd.learning_rate must be >= 0"),
        ({"engine": lambda: "layer_wise"}, "Did you mean layerwise"),
        ({"subspace": lambda: Full(law="uniform")}, "full.law must be one of"),
        ({"estimator": lambda: Central(eps=1e-12)}, "estimator.eps=1e-12 is below what float32"),
        ({"budget_queries": lambda: 1}, "budget.queries=1 is less than one step costs"),
        ({"budget_queries": lambda: 0}, "budget.queries must be at least 1"),
        ({"budget_queries": lambda: 10, "max_steps": lambda: 5}, "budget_queries or max_steps, not both"),
        ({"max_skipped_steps": lambda: 0}, "max_skipped_steps must be at least 1"),
        ({"max_grad_norm": lambda: -1.0}, "max_grad_norm must be at least 0, got -1.0; 0 clips nothing"),
        (
            {"learning_rate": lambda: 1e-2, "optimizer": lambda: SGD(learning_rate=1e-3)},
            "two values for learning_rate: 0.01 in the arguments and 0.001 on the optimizer",
        ),
        (
            {"weight_decay": lambda: 0.1, "optimizer": lambda: SGD(weight_decay=0.2)},
            "two values for weight_decay: 0.1 in the arguments and 0.2 on the optimizer",
        ),
    ],
)
def test_bad_settings_are_named(given: dict[str, Any], message: str, make: Callable[..., ZOTrainer]):
    with pytest.raises(UserError) as caught:
        make(models.tiny_llama(), **{key: value() for key, value in given.items()}).train()
    assert message in str(caught.value)


def test_eps_below_bfloat16_is_refused(make: Callable[..., ZOTrainer]):
    with pytest.raises(UserError, match=r"estimator\.eps=1e-05 is below what bfloat16"):
        make(models.tiny_llama().to(torch.bfloat16), estimator=Central(eps=1e-5))


def test_nothing_trainable_is_refused(make: Callable[..., ZOTrainer]):
    with pytest.raises(UserError, match="nothing is trainable"):
        make(models.tiny_llama().requires_grad_(False))


def test_derivatives_need_the_engine_that_has_them(make: Callable[..., ZOTrainer]):
    with pytest.raises(UserError, match="forward_mode"):
        make(models.tiny_llama(), estimator="forward_gradient", engine="layerwise").train()
    with pytest.raises(UserError, match="forward_gradient"):
        make(models.tiny_llama(), estimator="central", engine="forward_mode").train()


def test_a_folder_that_is_not_there(make: Callable[..., ZOTrainer]):
    with pytest.raises(UserError, match=r"there is no model folder \./nowhere"):
        make("./nowhere")


# ---- how it is called ------------------------------------------------------------------------------------------------


def test_a_folder_is_a_model(make: Callable[..., ZOTrainer], tmp_path: Path):
    model = models.tiny_llama()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = make(str(tmp_path / "model"), rows_for(model, 4))
    assert next(trainer.model.parameters()).dtype == torch.float32
    trainer.train()
    assert trainer.progress.steps == 3


def test_plain_arguments_are_completed(make: Callable[..., ZOTrainer], tmp_path: Path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=11,
        save_strategy="no",
    )
    trainer = make(models.tiny_llama(), args=args, estimator="central")
    assert isinstance(trainer.args, ZOConfig)
    assert (trainer.args.max_steps, trainer.args.per_device_train_batch_size, trainer.args.seed) == (2, 3, 11)
    assert (trainer.args.learning_rate, trainer.args.max_grad_norm) == (1e-6, 0.0)  # ours: 5e-5 and 1 are for backprop
    assert trainer.args.lr_scheduler_type == "constant"
    trainer.train()
    assert trainer.progress.steps == 2


def test_plain_arguments_keep_what_was_chosen(make: Callable[..., ZOTrainer], tmp_path: Path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        learning_rate=1e-3,
        max_grad_norm=2.0,
        lr_scheduler_type="cosine",
    )
    config = make(models.tiny_llama(), args=args).args
    assert (config.learning_rate, config.max_grad_norm, config.lr_scheduler_type) == (1e-3, 2.0, "cosine")


def test_no_arguments_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert ZOTrainer(models.tiny_llama()).args.learning_rate == 1e-6


def test_the_users_arguments_serve_a_second_trainer(tmp_path: Path, make: Callable[..., ZOTrainer]):
    """What one trainer settles (steps of a budget, a learning rate) is not the next one's."""
    args = ZOConfig(output_dir=str(tmp_path / "out"), budget_queries=12, use_cpu=True, report_to=[], disable_tqdm=True)
    before = args.to_dict()
    steps = []
    for estimator, optimizer in ((Central(), SGD(learning_rate=1e-2)), (OneSided(num_directions=3), Adam(1e-3))):
        trainer = make(models.tiny_llama(), args=args, estimator=estimator, optimizer=optimizer)
        steps.append(trainer.args.max_steps)
        assert trainer.args.learning_rate == optimizer.learning_rate
    assert steps == [6, 3]
    assert args.to_dict() == before


def test_direction_seeds_name_the_directions(make: Callable[..., ZOTrainer]):
    seeds = [11, 12, 11]
    rows = rows_for(models.tiny_llama(), 1)
    for noise in ("counter", "torch_sequential"):
        trainer = make(
            models.tiny_llama(),
            rows,
            per_device_train_batch_size=1,
            learning_rate=0.0,
            direction_seeds=seeds,
            estimator=Central(noise=noise),
            engine="layerwise",
        )
        trainer.train()
        grads = lines(trainer, "projected_grad")
        if noise == "torch_sequential":  # its stream knows the seed alone
            assert grads[0] == grads[2] != grads[1]
        else:
            assert len(set(grads)) == 3
    trainer = make(models.tiny_llama(), rows, direction_seeds=[1], max_steps=2, per_device_train_batch_size=1)
    with pytest.raises(UserError, match="direction_seeds has 1 entries, step 1 needs one more"):
        trainer.train()


def test_every_field_of_the_config_is_explained():
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    own_fields = [field for field in dataclasses.fields(ZOConfig) if field.name not in stock]
    assert {field.name for field in own_fields} >= {"budget_queries", "max_skipped_steps"}
    for field in dataclasses.fields(ZOConfig):
        if field in own_fields or field.name in ("learning_rate", "lr_scheduler_type", "max_grad_norm"):
            assert len(field.metadata["help"]) > 20, field.name
    for field in own_fields:
        assert f"{field.name}:" in (ZOConfig.__doc__ or ""), field.name


def test_the_arguments_parse_from_a_command_line():
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(ZOConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--budget_queries", "40", "--use_cpu", "True", "--report_to", "none"]
    )
    assert args.budget_queries == 40


def test_an_objective_replaces_the_models_loss(make: Callable[..., ZOTrainer]):
    from zoft.lm.data.tokens import OptionCollator

    rows = [
        {"sequences": [[5, 6, 7, 8 + i % 2], [5, 6, 7, 9 - i % 2]], "lengths": [1, 1], "label": 0} for i in range(8)
    ]
    trainer = make(
        models.tiny_llama(), rows, eval_dataset=rows, data_collator=OptionCollator(models.PAD), objective="options"
    )
    trainer.train()
    output = trainer.predict(rows)
    assert output.predictions.shape == (8, 2)
    assert output.label_ids.tolist() == [0] * 8
    assert lines(trainer, "loss")[0] == pytest.approx(math.log(2), abs=0.2)


# ---- only what counts in the forward ---------------------------------------------------------------------------------


def head_rows(trainer: ZOTrainer) -> list[int]:
    """How many positions went through the head, call by call."""
    seen: list[int] = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _a, output: seen.append(output.shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("family", models.CAUSAL)
def test_a_query_applies_the_head_to_labelled_positions_and_evaluation_to_all(
    family: str, make: Callable[..., ZOTrainer]
):
    rows = unequal_rows(8)
    labelled = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    given = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_steps": 2}
    trainer = make(models.CAUSAL[family](), rows, eval_dataset=rows, **given)
    seen = head_rows(trainer)
    trainer.train()
    assert seen[-2:] == [labelled] * 2  # the last step's queries; before the first one it is found out that they may
    trainer.evaluate()
    assert seen[-1] == 8 * 12


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("family", models.CAUSAL)
def test_the_losses_are_those_of_all_positions(family: str, accumulation: int, make: Callable[..., ZOTrainer]):
    losses = []
    given = {"gradient_accumulation_steps": accumulation, "max_steps": 2, "estimator": Central(eps=1e-2)}
    for whole_outputs in (False, True):
        trainer = make(models.CAUSAL[family](), unequal_rows(24), **given)
        trainer.query_forward.has_own_loss = whole_outputs
        trainer.train()
        losses.append(lines(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=2e-6)


def test_a_step_is_applied_once(make: Callable[..., ZOTrainer]):
    """A callback that calls step() again would take it twice, and the journal would know of one."""

    class Twice(TrainerCallback):
        def on_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
            optimizer.step()

    trainer = make(models.tiny_llama(), max_steps=2)
    trainer.add_callback(Twice())
    with pytest.raises(RuntimeError, match="without a training step before it"):
        trainer.train()
    assert trainer.last_step is not None
    assert trainer.last_step.is_applied
    assert [record.step for record in files.read(Path(trainer.args.output_dir) / files.NAME).records] == [0]


def test_who_computes_a_loss_from_the_logits_gets_all_of_them(make: Callable[..., ZOTrainer]):
    def custom_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        assert outputs.logits.shape[:2] == labels.shape
        return outputs.logits.float().square().mean()

    class Looking(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            assert outputs.logits.shape[:2] == inputs["labels"].shape
            return (loss, outputs) if return_outputs else loss

    for given in ({"compute_loss_func": custom_loss}, {"label_smoothing_factor": 0.1}, {"cls": Looking}):
        trainer = make(models.tiny_llama(), unequal_rows(8), per_device_train_batch_size=8, max_steps=1, **given)
        seen = head_rows(trainer)
        trainer.train()
        assert seen[-2:] == [8 * 12] * 2


def option_rows(count: int, lengths: tuple[int, ...] = (2, 3, 2)) -> Rows:
    """Prompts of some 8 tokens with three options: worth packing."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        prompt, *options = [
            torch.randint(4, 64, (n,), generator=generator).tolist() for n in (8 + number % 4, *lengths)
        ]
        sequences = [prompt + option for option in options]
        rows.append({"sequences": sequences, "lengths": [*lengths], "label": number % 3, "input_ids": sequences[1]})
    return rows


def packed_tokens(rows: Rows) -> int:
    return sum(len(row["sequences"][0]) - 2 + 1 + 2 + 1 for row in rows)


@pytest.mark.parametrize("objective", ["options", "cross_entropy"])
@pytest.mark.parametrize(
    "given", [{}, {"subspace": "blocks"}, {"subspace": "low_rank"}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_packed_rows_train_as_separate_ones_do(objective: str, given: dict[str, Any], make: Callable[..., ZOTrainer]):
    """Whatever work an engine shares between the queries of a step."""
    from zoft.lm.data.tokens import OptionCollator

    results = []
    for separate, engine in ((True, "in_place"), (False, "in_place"), (False, "auto")):
        trainer = make(
            models.tiny_llama(),
            option_rows(24),
            data_collator=OptionCollator(models.PAD, one_row_per_option=separate),
            objective=objective,
            engine=engine,
            estimator=Central(eps=1e-2, num_directions=2),
            max_steps=5,
            **given,
        )
        trainer.train()
        results.append((lines(trainer, "loss"), lines(trainer, "projected_grad")))
    for losses, grads in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        assert grads == pytest.approx(results[0][1], rel=1e-3, abs=1e-4)


def test_packed_tokens_are_counted_as_they_are_computed(make: Callable[..., ZOTrainer]):
    from zoft.lm.data.tokens import OptionCollator

    given = {"objective": "options", "data_collator": OptionCollator(models.PAD), "max_steps": 1}
    rows = option_rows(4)
    packs = make(models.tiny_llama(), rows, **given)
    packs.train()
    assert packs.progress.num_tokens == 2 * packed_tokens(rows)
    refuses = make(models.tiny_bloom(), rows, **given)
    refuses.train()
    assert refuses.progress.num_tokens == 2 * sum(len(s) for row in rows for s in row["sequences"])


@pytest.mark.parametrize("single", [False, True])
def test_hidden_states_that_are_kept_come_before_packing(single: bool, make: Callable[..., ZOTrainer]):
    """Kept states are found by what a row is, and a packed row is not one: the reuse must not be lost."""
    from zoft.lm.data.tokens import OptionCollator
    from zoft.lm.models.trainable.last_blocks import LastBlocks

    model, rows = models.tiny_llama(), option_rows(8, (1, 1, 1) if single else (2, 3, 2))
    LastBlocks(1).apply(model)
    trainer = make(
        model, rows, eval_dataset=rows, objective="options", data_collator=OptionCollator(models.PAD), max_steps=2
    )
    assert trainer.query_forward.frozen_prefix is not None
    for _ in trainer.query_forward.fill_prefix(rows):
        pass
    num_rows = 8 if single else 8 * 3
    assert len(trainer.query_forward.frozen_prefix.rows) == num_rows
    computed = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: computed.append(1))
    trainer.train()
    trainer.evaluate()
    assert trainer.query_forward.frozen_prefix.usable
    assert (
        len(trainer.query_forward.frozen_prefix.rows) <= num_rows + 2
    )  # (the piece on which it was found out about the head)
    assert len(computed) <= 4


@pytest.mark.parametrize("foreign", [False, True])
def test_in_place_weights_are_clean_whenever_somebody_else_looks(make: Callable[..., ZOTrainer], foreign: bool):
    """A callback between query and step, and after the step, sees the weights and not a point beside them."""
    from transformers import TrainerCallback

    from zoft.engines.in_place import InPlace

    seen = []

    class Looks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))

    trainer = make(models.tiny_llama(), engine=InPlace("subtract"), max_steps=4, learning_rate=0.0)
    start = torch.cat([p.detach().view(-1).clone() for p in trainer.model.parameters()])
    if foreign:
        trainer.add_callback(Looks())
    trainer.train()
    seen.append(torch.cat([p.detach().view(-1) for p in trainer.model.parameters()]))
    assert len(seen) == (9 if foreign else 1)
    for weights in seen:
        assert float((weights - start).abs().max()) < 1e-6
