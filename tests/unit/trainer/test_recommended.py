"""A trainer that is given no method: node directions where the loss is read by position, MeZO's parts elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from tests.models import tiny_opt
from zoft import ZOConfig, ZOTrainer

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(8)]


def trainer(tmp_path: Any, cls: Any = ZOTrainer, rows: Any = ROWS, settings: Any = None, **parts: Any) -> Any:
    args = ZOConfig(output_dir=str(tmp_path), budget_queries=12, report_to=[], use_cpu=True, **(settings or {}))
    return cls(model=tiny_opt(), args=args, train_dataset=rows, **parts)


def test_the_models_own_loss_is_learnt_by_node_directions(tmp_path: Any, caplog: pytest.LogCaptureFixture):
    zo_trainer = trainer(tmp_path)
    assert zo_trainer.method.subspace.name() == "nodes"
    assert (zo_trainer.args.learning_rate, zo_trainer.args.max_steps) == (4.0, 12)
    assert "no method is named: node directions" in caplog.text
    before = float(zo_trainer.evaluate(ROWS)["eval_loss"])
    zo_trainer.train()
    assert float(zo_trainer.evaluate(ROWS)["eval_loss"]) < before - 0.3


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
