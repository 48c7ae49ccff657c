"""A trainer that is given no method: node directions where the loss is read by position, MeZO's parts elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.models import tiny_bert_classifier, tiny_mixtral, tiny_opt
from zoft import ZOConfig, ZOTrainer
from zoft.errors import UserError
from zoft.estimators.nodes import Nodes
from zoft.lm.data.completions import CountedCollator
from zoft.lm.objectives.cross_entropy import CrossEntropy

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(8)]
CLASSES = [{"input_ids": [5, 6, 7, 8 + k], "labels": k % 3} for k in range(8)]
NODES = {"subspace": "nodes", "estimator": "nodes", "optimizer": "whiten"}


def trainer(
    tmp_path: Any, cls: Any = ZOTrainer, rows: Any = ROWS, settings: Any = None, make: Any = tiny_opt, **parts: Any
) -> Any:
    args = ZOConfig(output_dir=str(tmp_path), budget_queries=12, report_to=[], use_cpu=True, **(settings or {}))
    return cls(model=make(), args=args, train_dataset=rows, **parts)


def test_the_models_own_loss_is_learnt_by_node_directions(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    zo_trainer = trainer(tmp_path)
    assert zo_trainer.method.subspace.name() == "nodes"
    assert (zo_trainer.args.learning_rate, zo_trainer.args.max_steps) == (4.0, 12)
    assert "no method is named: node directions" in caplog.text
    before = float(zo_trainer.evaluate(ROWS)["eval_loss"])
    zo_trainer.train()
    assert float(zo_trainer.evaluate(ROWS)["eval_loss"]) < before - 0.3


def made_later() -> Any:
    """As the Trainer calls it."""
    return tiny_opt()


def test_a_model_that_is_made_later_is_looked_at_too(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    """It was trained by MeZO's parts at 1e-6, and nothing was said."""
    first, args = trainer(tmp_path / "model"), ZOConfig(str(tmp_path), budget_queries=12, report_to=[], use_cpu=True)
    second = ZOTrainer(model_init=made_later, args=args, train_dataset=ROWS)
    assert caplog.text.count("no method is named: node directions") == 2
    for each in (first, second):
        each.train()
    assert second.evaluate(ROWS)["eval_loss"] == first.evaluate(ROWS)["eval_loss"]


def test_a_search_of_hyper_parameters_goes_by_the_loss_and_takes_each_trials_budget(tmp_path: Any):
    """It went by the sum of queries, tokens and seconds: the fastest trial was the best one."""
    args = ZOConfig(str(tmp_path), budget_queries=4, report_to=[], use_cpu=True, learning_rate=1e-3, save_strategy="no")
    zo_trainer, spent = ZOTrainer(model_init=made_later, args=args, train_dataset=ROWS, eval_dataset=ROWS), []
    zo_trainer.add_callback(Spent(spent, zo_trainer))
    best = zo_trainer.hyperparameter_search(
        lambda trial: {"budget_queries": trial.suggest_int("budget_queries", 6, 6), "learning_rate": 1e-2},
        n_trials=2,
        backend="optuna",
    )
    alone = ZOConfig(str(tmp_path / "alone"), budget_queries=6, report_to=[], use_cpu=True, learning_rate=1e-2)
    same = ZOTrainer(model=tiny_opt(), args=alone, train_dataset=ROWS)
    same.train()
    assert best.objective == same.evaluate(ROWS)["eval_loss"]
    assert spent == [6, 6]


def test_a_search_keeps_the_trainers_own_objective(tmp_path: Any):
    """transformers writes a trial's result to `trainer.objective`: it was a float in the place of what is minimised."""
    given: dict[str, Any] = {
        "report_to": [],
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    args = ZOConfig(str(tmp_path), budget_queries=4, learning_rate=1e-3, **given)
    rows: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": ROWS, "data_collator": CountedCollator(0)}
    zo_trainer = ZOTrainer(model_init=made_later, args=args, objective="cross_entropy", estimator="central", **rows)
    zo_trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert zo_trainer.zo_objective == CrossEntropy()
    assert (tmp_path / "run-1" / "checkpoint-2").is_dir()
    assert (tmp_path / "journal.old.bin").exists()  # the journal is of the trial at hand


class Spent(transformers.TrainerCallback):
    """Notes the queries of each training."""

    def __init__(self, spent: list[int], zo_trainer: Any) -> None:
        self.spent, self.trainer = spent, zo_trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """At the end of one."""
        self.spent.append(self.trainer.progress.num_queries)


class Other(ZOTrainer):
    """A loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs).loss


@pytest.mark.parametrize(
    "given",
    [
        {"estimator": "central"},
        {"optimizer": "adam"},
        {"settings": {"learning_rate": 1e-3}},
        {"settings": {"max_grad_norm": 1.0}},
        {"settings": {"torch_compile": True}},
        {"engine": "in_place"},
        {"cls": Other},
        {"rows": [{"input_ids": [5, 6, 7]}]},
        {"rows": None},
        {"compute_loss_func": lambda outputs, labels, **_: outputs.loss},
    ],
    ids=lambda given: " ".join(given),
)
def test_what_is_named_or_not_served_keeps_the_directions_in_the_weights(given: dict[str, Any], tmp_path: Any):
    assert trainer(tmp_path, **given).method.subspace.name() == "full"


def weighted() -> Any:
    """A classifier with the loss of a user's own class, whose name says nothing of it."""

    class WeightedForSequenceClassification(transformers.BertForSequenceClassification):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if labels is not None:
                weight = torch.tensor([1.0, 1.0, 5.0])
                output.loss = torch.nn.functional.cross_entropy(output.logits, labels, weight=weight)
            return output

    model = tiny_bert_classifier()
    model.__class__ = WeightedForSequenceClassification
    return model


def pooled(pooling: str) -> Any:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    sizes = {"vocab_size": 64, "num_labels": 3, "max_position_embeddings": 64}
    config = transformers.ModernBertConfig(**small, **ends, **sizes, classifier_pooling=pooling)
    with torch.random.fork_rng(devices=[]):
        return transformers.ModernBertForSequenceClassification(config).eval()


class Same(ZOTrainer):
    """The loss is looked at and left as it is."""

    def compute_loss(self, *given: Any, **more: Any) -> Any:
        return super().compute_loss(*given, **more)


class Squared(ZOTrainer):
    """A loss of its own, which is another one."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"]).logits.square().mean()


def router() -> Any:
    return tiny_mixtral(output_router_logits=True, router_aux_loss_coef=0.001)


OTHER_LOSSES = {
    "smoothed": ({"settings": {"label_smoothing_factor": 0.3}}, "label_smoothing_factor"),
    "smoothed classes": (
        {"settings": {"label_smoothing_factor": 0.01}, "make": tiny_bert_classifier, "rows": CLASSES},
        "label_smoothing_factor",
    ),
    "function": ({"compute_loss_func": lambda outputs, labels, **_: outputs.logits.square().mean()}, "compute_loss"),
    "method": ({"cls": Squared}, "compute_loss"),
    "weighted": ({"make": weighted, "rows": CLASSES}, "more than the cross-entropy"),
    "router": ({"make": router}, "more than the cross-entropy"),
    "mean": ({"make": lambda: pooled("mean"), "rows": CLASSES}, "other positions"),
    "regression": ({"make": lambda: tiny_bert_classifier(num_labels=1), "rows": CLASSES}, "which positions the loss"),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_loss_that_is_not_read_is_trained_as_it_is_with_a_note(name: str, tmp_path: Any, caplog: Any):
    given, said = OTHER_LOSSES[name]
    zo_trainer = trainer(tmp_path, **given)
    assert zo_trainer.method.subspace.name() == "full"
    assert "no method is named: MeZO's parts" in caplog.text
    assert said in caplog.text
    zo_trainer.train()


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_loss_that_is_not_read_is_refused_where_node_directions_are_named(name: str, tmp_path: Any):
    given, said = OTHER_LOSSES[name]
    with pytest.raises(UserError, match=said):
        trainer(tmp_path, **given, **NODES).train()


@pytest.mark.parametrize(
    "given",
    [
        {"cls": Same},
        {"make": tiny_bert_classifier, "rows": CLASSES},
        {"make": tiny_mixtral},
        {"make": lambda: pooled("cls"), "rows": CLASSES},
    ],
    ids=["same loss", "classes", "mixture", "first token"],
)
def test_a_loss_that_is_read_is_learnt_where_node_directions_are_named(given: dict[str, Any], tmp_path: Any):
    zo_trainer = trainer(tmp_path, **given, **NODES)
    before = float(zo_trainer.evaluate(zo_trainer.train_dataset)["eval_loss"])
    zo_trainer.train()
    assert float(zo_trainer.evaluate(zo_trainer.train_dataset)["eval_loss"]) < before


TOKENS = [{"input_ids": [5, 6, 7, 8 + k], "labels": [5, 6, 7, 8 + k]} for k in range(4)]
KINDS = {"tokens": (tiny_opt, TOKENS, [-100] * 4), "classes": (tiny_bert_classifier, CLASSES[:4], -100)}


def trained(tmp_path: Any, make: Any, rows: Any, size: int, micro: int = 1, **parts: Any) -> list[Any]:
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": size}
    settings |= {"gradient_accumulation_steps": micro, "max_skipped_steps": 9, "save_strategy": "no"}
    zo_trainer = trainer(tmp_path, rows=rows, make=make, settings=settings, **parts)
    assert zo_trainer.method.subspace.name() == "nodes"
    zo_trainer.train()
    return [parameter.detach().clone() for parameter in zo_trainer.model.parameters()]


@pytest.mark.parametrize("estimator", [None, Nodes(feedback="loss", every=1), Nodes(feedback="exact")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_whose_labels_do_not_count_say_nothing(kind: str, estimator: Any, tmp_path: Any):
    make, rows, none = KINDS[kind]
    parts = {} if estimator is None else {**NODES, "estimator": estimator}
    a, b, c, d = rows
    u = {**a, "labels": none}
    beside = trained(tmp_path / "a", make, [a, u, b, u, u, c, d, u], 2, **parts)
    torch.testing.assert_close(beside, trained(tmp_path / "b", make, rows, 1, **parts), rtol=1e-3, atol=1e-3)
    micro = trained(tmp_path / "c", make, [a, b, u, u, u, u, c, d], 2, 2, **parts)
    torch.testing.assert_close(micro, trained(tmp_path / "d", make, rows, 2, **parts), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_without_a_label_that_counts_is_left_out(kind: str, tmp_path: Any):
    make, rows, none = KINDS[kind]
    moved = trained(tmp_path, make, [{**row, "labels": none} for row in rows[:2]] + rows[2:], 2)
    start = list(make().parameters())
    assert all(parameter.isfinite().all() for parameter in moved)
    assert any(not torch.equal(one, other) for one, other in zip(moved, start, strict=True))
