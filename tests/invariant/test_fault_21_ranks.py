"""Two processes with two rows each are one with four, for everything that tells examples or rows apart."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.faults import zygote

STEPS, ROWS = 4, 16
CASES: dict[str, dict[str, Any]] = {
    "zoft": {"method": "zoft"},
    "grzo": {"method": "grzo"},
    "grzo, low_rank, accumulated": {"method": "grzo", "subspace": "low_rank", "accumulated": 2},
    "mezo_svrg, accumulated": {"method": "mezo_svrg", "anchor": 2, "accumulated": 2},
    "masks from a gradient": {"method": "senszoq"},
}
"""Name -> what is trained; a case runs 1 x 4 rows, 2 x 2, and half in one and half in the other."""


def trainer(case: str, folder: Path, *, world: int, steps: int = STEPS, micro: int = 1) -> Any:
    """The case's trainer with four rows a step (eight where they are accumulated), divided among the processes."""
    from dataclasses import replace

    from zoft import ZOConfig, ZOTrainer
    from zoft.component import create
    from zoft.config import compose

    given = CASES[case]
    cfg = compose([f"method={given['method']}", "task=sst2", "model.name=x"])
    estimator, subspace = replace(cfg.estimator, eps=1e-2), cfg.subspace
    if "anchor" in given:
        estimator = replace(estimator, anchor_batches=given["anchor"])
    if "subspace" in given:
        subspace = create("subspace", given["subspace"], "full")
    model = models.tiny_llama()
    batch = models.batch_for(model, rows=ROWS, length=9)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]
    union = 4 * given.get("accumulated", 1)
    args = ZOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=union // world // micro,
        gradient_accumulation_steps=micro,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    zo_trainer = ZOTrainer(
        model,
        args,
        train_dataset=rows,
        estimator=estimator,
        subspace=subspace,
        weighting=cfg.weighting,
        optimizer=replace(cfg.optimizer, learning_rate=None),
    )
    if steps < STEPS:
        zo_trainer.add_callback(_stop_after(steps))
    return zo_trainer


def _stop_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return StopAfter()


def weights_of(one: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.model.named_parameters()}


def slug(case: str) -> str:
    return case.replace(", ", "-").replace(" ", "-")


def main(folder: Path) -> None:
    """What each of two processes runs: each case from its start, and on from two steps of one process."""
    for case, given in CASES.items():
        micro = given.get("accumulated", 1)
        whole = trainer(case, folder / f"{slug(case)}-two", world=2, micro=micro)
        whole.train()
        resumed = trainer(case, folder / f"{slug(case)}-one", world=2, micro=micro)
        resumed.train(resume_from_checkpoint=True)
        begun = trainer(case, folder / f"{slug(case)}-begun", world=2, steps=2, micro=micro)
        begun.train()
        if os.environ["RANK"] == "0":
            torch.save({"whole": weights_of(whole), "resumed": weights_of(resumed)}, folder / f"{slug(case)}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for case in CASES:
        trainer(case, folder / f"{slug(case)}-one", world=1, steps=2).train()
    zygote.shared().program("tests.invariant.test_fault_21_ranks", folder)
    return folder


def _apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], begun: dict[str, torch.Tensor]) -> float:
    """|difference| / |step|."""
    between = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    step = sum(float((theirs[name] - begun[name]).square().sum()) for name in theirs) ** 0.5
    assert step > 0
    return between / step


@pytest.mark.parametrize("case", CASES)
def test_fault_21_two_processes_of_two_rows_are_one_of_four(case: str, two: Path, tmp_path: Path):
    alone = trainer(case, tmp_path / "alone", world=1)
    begun = weights_of(alone)
    alone.train()
    states = torch.load(two / f"{slug(case)}.pt")
    assert _apart(states["whole"], weights_of(alone), begun) < 1e-3
    assert _apart(states["resumed"], weights_of(alone), begun) < 1e-3
    back = trainer(case, two / f"{slug(case)}-begun", world=1)
    back.train(resume_from_checkpoint=True)
    assert _apart(weights_of(back), weights_of(alone), begun) < 1e-3
