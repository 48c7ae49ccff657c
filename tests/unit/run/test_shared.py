"""Cells of one process share a load of the model, adapters too, and each is the cell alone to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import runs
from tests.models import tiny_llama
from zoft.component import create
from zoft.config import compose
from zoft.lm.models import load
from zoft.lm.models.peft.base import unwrapped
from zoft.run.shared import Shared
from zoft.run.train import run

ADAPTER = (
    "trainable=adapter",
    "optimizer.learning_rate=0.1",
    "budget.queries=8",
    "trainer.save_strategy=no",
    "trainer.eval_strategy=no",
)
CELLS = {
    "lora": ("peft=lora", *ADAPTER),
    "another seed": ("peft=lora", "seed=1", *ADAPTER),
    "another rank": ("peft=lora", "peft.r=2", "peft.target_modules=[up_proj]", *ADAPTER),
    "prefix": ("peft=prefix", *ADAPTER),
    "mezo's prefix": ("peft=prefix", "peft.layout=mezo", "peft.num_virtual_tokens=3", *ADAPTER),
    "prompt": ("peft=prompt", *ADAPTER),
    "nodes": ("peft=lora", "method=zoft", *ADAPTER),
    "lora again": ("peft=lora", *ADAPTER),
}


def test_a_cell_with_an_adapter_is_the_cell_alone(tmp_path: Path, monkeypatch: Any):
    loads, whole = [], load._load_whole

    def counted(*given: Any, **more: Any) -> Any:
        loads.append(given)
        return whole(*given, **more)

    monkeypatch.setattr(load, "_load_whole", counted)
    shared, results = Shared(), {}
    for number, (name, more) in enumerate(CELLS.items()):
        report = run(compose(runs.arguments(tmp_path, tmp_path / f"shared{number}", *more)), shared=shared)
        results[name] = report["weights_sha256"], report["final"]
    assert len(loads) == 1
    for number, (name, more) in enumerate(CELLS.items()):
        report = run(compose(runs.arguments(tmp_path, tmp_path / f"alone{number}", *more)))
        assert (report["weights_sha256"], report["final"]) == results[name], name
    assert results["lora"] == results["lora again"] != results["another seed"]


@pytest.mark.parametrize(
    ("peft", "more"), [("lora", {}), ("prefix", {}), ("prefix", {"layout": "mezo"}), ("prompt", {})]
)
def test_a_model_without_its_adapter_is_as_it_was(peft: str, more: dict[str, str]):
    model = tiny_llama()
    ids, before = torch.tensor([[4, 5, 6]]), {name: id(tensor) for name, tensor in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        wrapped = create("peft", peft, peft, **more).wrap(model, 0).train()
        for tensor in wrapped.parameters():
            if tensor.requires_grad:
                tensor.add_(1.0)
        base = unwrapped(wrapped)
        assert torch.equal(base(input_ids=ids).logits, logits)
    assert base is model
    assert not base.training
    assert not hasattr(base, "peft_config")
    assert {name: id(tensor) for name, tensor in base.named_parameters()} == before
    assert [len(module._forward_pre_hooks) for module in base.modules()] == hooks
