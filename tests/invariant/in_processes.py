"""What each process of test_processes.py runs: some trainings, and what this rank has in hand after each.

Called with a folder by each of two processes (``Zygote.program``), or in the test's own process for one process alone.
"""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests import models
from zoft.estimators.central import Central
from zoft.estimators.one_sided import OneSided
from zoft.lm.objectives.cross_entropy import CrossEntropy
from zoft.subspaces.activation import Activation

STEPS = 6
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "unequal_tokens": {"unequal": True},
    "adam_accumulated": {"optimizer": "adam", "gradient_accumulation_steps": 2},
    "classifier": {"family": "bert"},
    "classifier_accumulated": {"family": "bert", "gradient_accumulation_steps": 2},
    "one_sided_lora": {"lora": True, "estimator": OneSided(eps=1e-2)},
    "nan_on_one": {"nan_on_one": True},
    "stream_accumulated": {"stream": 20, "unequal": True, "gradient_accumulation_steps": 2},
    "in_place": {"engine": "in_place"},
    "activation": {"subspace": Activation(rank=2)},
    "per_prompt": {"objective": CrossEntropy(), "weighting": "per_prompt", "unequal": True},
    "stopped": {"interrupt": True},
    "resumed": {"resume": "stopped"},
}
"""Name -> what differs from the plain run."""


def dataset(model: Any, *, unequal: bool) -> list[dict[str, Any]]:
    batch = models.batch_for(model, rows=24, length=9)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(24)]
    for number, row in enumerate(rows if unequal else ()):
        row["labels"] = row["labels"].clone()
        row["labels"][: 8 - number % 7] = -100
    return rows


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows without a known number: five micro-batches a pass where a step has two."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def train(case: str, folder: Path, *, rank: int, world: int) -> dict[str, Any]:
    """One training of 8 rows a step, divided among the processes; rank 1 begins with other weights."""
    from zoft import ZOConfig, ZOTrainer
    from zoft.trainer.signals import StopOnInterrupt
    from zoft.weights.tensors import Weights

    given = dict(CASES[case])
    build = models.EVERY[given.pop("family", "llama")]
    resume, nan_on_one, interrupt = (given.pop(key, False) for key in ("resume", "nan_on_one", "interrupt"))
    unequal, stream = given.pop("unequal", False), given.pop("stream", 0)

    class Disturbed(ZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
            if self.progress.steps == 2 and rank == world - 1:
                if interrupt and not stop.heard:
                    os.kill(os.getpid(), signal.SIGINT)
                if nan_on_one:
                    return loss * math.nan
            return loss

    model = build(seed=0 if given.get("lora") else rank)  # an adapter leaves its base alone: it has to be the same
    rows = dataset(model, unequal=unequal)
    if given.pop("lora", False):
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4)
    accumulated = given.get("gradient_accumulation_steps", 1)
    given.setdefault("estimator", Central(eps=1e-2))
    keys = ("gradient_accumulation_steps", "learning_rate")
    args = ZOConfig(
        output_dir=str(folder / (resume or case)),
        max_steps=STEPS,
        per_device_train_batch_size=8 // world // accumulated,
        per_device_eval_batch_size=4,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"learning_rate": 1e-3} | {key: given.pop(key) for key in keys if key in given}),
    )
    stop = StopOnInterrupt()
    trainer = Disturbed(
        model,
        args,
        train_dataset=Stream(rows[:stream]) if stream else rows,
        eval_dataset=rows[:16],
        callbacks=[stop],
        **given,
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    torch.save({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, folder / f"{case}-{rank}.pt")
    return {
        "digest": Weights(trainer.model).digest(),
        "steps": trainer.state.global_step,
        "losses": [line["loss"] for line in lines],
        "projected_grads": [line["projected_grad"] for line in lines],
        "num_tokens": trainer.progress.num_tokens,
        "num_queries": trainer.progress.num_queries,
        "num_skipped": trainer.progress.num_skipped,
        "num_processes": trainer.accelerator.num_processes,
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def shared(rank: int) -> dict[str, Any]:
    """What is sent at the start: of equal models nothing, of one tensor that differs that tensor, of others nothing."""
    from zoft.trainer import ranks

    model = models.tiny_llama()
    results: dict[str, Any] = {"equal": ranks.share_weights(model)}
    model.lm_head.weight.data[0, 0] += rank
    results["one_differs"] = ranks.share_weights(model)
    results["bytes_of_one"] = model.lm_head.weight.numel() * 4
    results["again"] = ranks.share_weights(model)
    results["another_model"] = refusal(lambda: ranks.share_weights(torch.nn.Linear(3 + rank, 2)))
    return results


def refused(folder: Path, rank: int) -> dict[str, str]:
    """What each process says where the last one has been started with something else."""
    from zoft import ZOConfig, ZOTrainer
    from zoft.config import compose
    from zoft.run.train import run
    from zoft.trainer import ranks

    def train_at(rate: float) -> None:
        args = ZOConfig(
            output_dir=str(folder / "rates"), max_steps=2, report_to=[], dataloader_pin_memory=False, learning_rate=rate
        )
        model = models.tiny_llama()
        ZOTrainer(model, args, train_dataset=dataset(model, unequal=False)).train()

    words = ["model.name=nowhere/at-all", "config=quickstart", f"output_dir={folder / 'other'}", f"seed={rank}"]
    sentences = {"config": refusal(lambda: run(compose(words)))}
    sentences["settings"] = refusal(lambda: train_at(1e-3 * (1 + rank)))
    code = ranks.code()
    ranks.code = lambda: code + f"\ntorch 2.{rank}"  # type: ignore[assignment]
    sentences["code"] = refusal(lambda: ranks.require_same({}))
    ranks.code = lambda: code  # type: ignore[assignment]
    return sentences


def refusal(call: Callable[[], Any]) -> str:
    """The sentence that a call is refused with; the empty string where it is not."""
    from zoft.errors import UserError

    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {case: train(case, folder, rank=rank, world=world) for case in CASES}
    results["shared"], results["refused"] = shared(rank), refused(folder, rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
