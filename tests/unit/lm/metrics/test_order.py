"""Batches of rows of alike lengths, in evaluation and in training, and results in the order of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests import models
from tests.runs import tiny_tokenizer
from tests.unit.lm.objectives.test_objectives import row
from zoft import ZOConfig, ZOTrainer
from zoft.lm.data.tokens import OptionCollator, encode
from zoft.lm.metrics.order import LongestFirst, in_rows_order, lengths_of, order_of
from zoft.lm.tasks import Example

LENGTHS = [6, 3, 14, 9, 3, 11, 5, 8, 4, 12]


def rows(options: tuple[int, ...] = (1, 1)) -> list[dict[str, Any]]:
    examples = [row(length, list(options), number % 2, number) for number, length in enumerate(LENGTHS)]
    return [example | {"input_ids": max(example["sequences"], key=len)} for example in examples]


def trainer(folder: Path, **given: Any) -> ZOTrainer:
    fields = {"per_device_eval_batch_size": 3, "per_device_train_batch_size": 3, "max_steps": 2} | given.pop("args", {})
    args = ZOConfig(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **fields)
    given.setdefault("train_dataset", rows())
    given.setdefault("objective", "options")
    return ZOTrainer(models.tiny_llama(), args, data_collator=OptionCollator(models.PAD), **given)


def widths(trainer: ZOTrainer) -> list[tuple[int, ...]]:
    """Shapes of the batches that the model is called with."""
    seen: list[tuple[int, ...]] = []

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_longest_first_ties_in_order():
    assert list(LongestFirst([3, 7, 3, 9])) == [3, 1, 0, 2]
    assert len(LongestFirst([3, 7])) == 2


def test_results_come_back_in_the_order_of_the_rows(tmp_path: Path):
    metric_inputs = []

    def metric(prediction: Any) -> dict[str, float]:
        metric_inputs.append((prediction.predictions.copy(), prediction.label_ids.copy()))
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    one = trainer(tmp_path, compute_metrics=metric)
    data = rows()
    alone = numpy.stack([one.predict([example]).predictions[0] for example in data])
    metric_inputs.clear()
    one.zo_objective.predict(one.model, OptionCollator(models.PAD)(data[:1]))  # (what is found out about the head)
    seen = widths(one)
    output = one.predict(data)
    assert seen == [(3, 14), (3, 9), (3, 5), (1, 3)]
    numpy.testing.assert_allclose(output.predictions, alone, rtol=1e-5, atol=1e-6)
    assert output.label_ids.tolist() == [example["label"] for example in data]
    ((predictions, labels),) = metric_inputs
    assert numpy.array_equal(predictions, output.predictions)
    assert numpy.array_equal(labels, output.label_ids)
    assert one.compute_metrics is metric
    again = one.predict(data)
    assert numpy.array_equal(again.predictions, output.predictions)


@pytest.mark.parametrize(
    "args",
    [{"include_for_metrics": ["loss"]}, {"eval_do_concat_batches": False}, {"batch_eval_metrics": True}],
    ids=lambda args: next(iter(args)),
)
def test_nothing_is_sorted_where_the_order_would_show(args: dict[str, Any], tmp_path: Path):
    one = trainer(tmp_path, args=args)
    assert order_of(one.get_test_dataloader(rows())) is None


def test_nothing_is_sorted_without_lengths_or_an_objective(tmp_path: Path):
    plain = [{key: value for key, value in example.items() if key != "input_ids"} for example in rows()]
    assert lengths_of(plain) is None
    assert lengths_of([]) is None
    assert lengths_of([[1, 2]]) is None
    assert order_of(trainer(tmp_path).get_test_dataloader(plain)) is None
    data = [{"input_ids": torch.tensor(e["input_ids"]), "labels": torch.tensor(e["input_ids"])} for e in rows()]
    plain_trainer = trainer(tmp_path, objective=None, train_dataset=data)
    assert order_of(plain_trainer.get_eval_dataloader(data)) is None


def test_a_data_loader_that_is_not_ours_keeps_its_order(tmp_path: Path):
    class Own(ZOTrainer):
        def get_test_dataloader(self, dataset: Any) -> Any:
            return torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=self.data_collator)

    one = trainer(tmp_path)
    one.__class__ = Own
    assert one.predict(rows()).label_ids.tolist() == [example["label"] for example in rows()]


def test_in_rows_order_takes_what_the_loop_gives():
    assert in_rows_order(None, [1, 0]) is None
    first, second = in_rows_order((numpy.array([1, 2]), numpy.array([[3], [4]])), [1, 0])
    assert first.tolist() == [2, 1]
    assert second.tolist() == [[4], [3]]


def test_encoded_rows_carry_the_length_that_samplers_measure():
    (encoded_row,) = encode([Example("win a free prize is it spam", (" no", " yes you"), 0)], tiny_tokenizer(), 100)
    assert encoded_row["input_ids"] == max(encoded_row["sequences"], key=len)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_training_batches_of_alike_lengths(strategy: str, tmp_path: Path):
    data = rows() * 8
    padding = {}
    for chosen in ("random", strategy):
        one = trainer(
            tmp_path,
            train_dataset=data,
            processing_class=tiny_tokenizer(),
            estimator="central",  # two queries a step
            args={"train_sampling_strategy": chosen, "max_steps": 8, "per_device_train_batch_size": 4, "seed": 1},
        )
        batches = [batch["attention_mask"] for batch in one.get_train_dataloader()]
        assert sum(len(mask) for mask in batches) == len(data)
        padding[chosen] = sum(int((mask == 0).sum()) for mask in batches)
        one.train()
        assert one.progress.num_queries == 16
    if strategy == "group_by_length":  # the other balances processes
        assert padding[strategy] < padding["random"] / 2


def test_the_command_line_groups_by_length(tmp_path: Path):
    from tests.runs import arguments
    from zoft.config import compose
    from zoft.run.train import run

    facts = {}
    for strategy in ("random", "group_by_length"):
        more = [f"trainer.train_sampling_strategy={strategy}", "trainer.eval_strategy=no"]
        facts[strategy] = run(compose(arguments(tmp_path, tmp_path / strategy, *more)))
    assert facts["random"]["num_queries"] == facts["group_by_length"]["num_queries"] == 24
    assert facts["random"]["zero_shot"] == facts["group_by_length"]["zero_shot"]
    assert facts["random"]["weights_sha256"] != facts["group_by_length"]["weights_sha256"]
