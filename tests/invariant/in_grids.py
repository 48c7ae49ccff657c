"""What the processes of test_grids.py run: trainings whose points, rows or both are divided, forked from one start.

`python -m tests.invariant.in_grids FOLDER RUNS` writes FOLDER/0.json, 1.json ...: what all processes of a run have.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

STEPS = 4
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {}),
    "n_spsa": ("n_spsa", {"num_directions": 2}),
    "fzoo": ("fzoo", {}),
    "es": ("es", {"num_directions": 4}),
    "grzo": ("grzo", {"num_directions": 2}),
    "svrg": ("mezo_svrg", {"anchor_batches": 2, "num_directions": 2}),
    "per_prompt": ("es", {"num_directions": 4}),  # weighs the loss of each example
    "trials": ("zo_sgd_cons", {"num_directions": 2}),  # asks where the step would lead: fewer points than processes
    "zoft": ("zoft", {"num_directions": 4, "every": 2}),
    "zoft_loss": ("zoft", {"num_directions": 4, "every": 1, "feedback": "loss"}),
}
"""Name -> (preset, fields of its estimator)."""


@cache
def composed(preset: str) -> Any:
    """The config of a method."""
    from zoft.config import compose

    return compose([f"method={preset}", "task=sst2", "model.name=x"])


def train(method: str, folder: Path, *, world: int = 1, stop: int = 0, **given: Any) -> dict[str, Any]:
    """One training of four rows a step; goes on in ``folder`` where something of it is there already."""
    from transformers import TrainerCallback

    from tests import models
    from zoft import ZOConfig, ZOTrainer
    from zoft.lm.objectives.cross_entropy import CrossEntropy
    from zoft.weights.tensors import Weights

    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    cfg, fields = composed(METHODS[method][0]), METHODS[method][1]
    num_rows = 14 if method == "mezo" else 16  # 14: the last step of a pass has two rows of four
    model = models.tiny_llama()
    batch = models.batch_for(model, rows=num_rows, length=9)
    directions = {"directions": world, "both": given.get("parallel_directions", 0)}.get(given.get("parallel", ""), 1)
    args = ZOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 * directions // world,
        learning_rate=1e-3,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        **given,
    )
    trainer = ZOTrainer(
        model,
        args,
        train_dataset=[{name: value[i] for name, value in batch.items()} for i in range(num_rows)],
        estimator=replace(cfg.estimator, **{"eps": 1e-2, **fields}),
        subspace=cfg.subspace,
        weighting="per_prompt" if method == "per_prompt" else cfg.weighting,
        objective=CrossEntropy() if method == "per_prompt" else None,
        optimizer=replace(cfg.optimizer, learning_rate=None),
        callbacks=[StopAfter()],
    )
    trainer.train(resume_from_checkpoint=(folder / "journal.bin").exists() or None)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "digest": Weights(trainer.model).digest(),
        "losses": [line["loss"] for line in lines],
        "slopes": [line.get("projected_grad") for line in lines],
        "bytes_sent": [line.get("bytes_sent") for line in lines],
        "num_queries": trainer.progress.num_queries,
        "num_tokens": trainer.progress.num_tokens,
        "steps": trainer.state.global_step,
    }


def refused(**given: Any) -> str:
    """The sentence that a training is refused with."""
    from zoft import ZOConfig, ZOTrainer
    from zoft.errors import UserError

    parts = {name: given.pop(name) for name in ("estimator", "train_dataset", "data_collator") if name in given}
    from tests import models

    args = {"max_steps": 1, "journal": False, "report_to": [], "use_cpu": True, "dataloader_pin_memory": False}
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer = ZOTrainer(models.tiny_llama(), ZOConfig(output_dir=folder, **args, **given), **parts)
            trainer.create_optimizer()
            trainer.get_train_dataloader()
            if "data_collator" in parts:
                trainer.train()
        except UserError as error:
            return str(error)
    return ""


def refusals() -> dict[str, str]:
    """What two processes are not started for."""
    import torch

    from zoft.estimators.central import Central
    from zoft.estimators.leave_one_out import LeaveOneOut

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    def drawn(rows: list[Any]) -> dict[str, Any]:
        ids = torch.stack([row["input_ids"] for row in rows]) + int(os.environ["RANK"])
        return {"input_ids": ids, "labels": ids}

    rows = [{"input_ids": torch.arange(4, 9), "labels": torch.arange(4, 9)}] * 8
    return {
        "rows": refused(parallel="directions", train_dataset=rows, data_collator=drawn),
        "trace": refused(parallel="directions", estimator=Central(noise="torch_sequential")),
        "odd": refused(parallel="directions", estimator=LeaveOneOut(num_directions=3)),
        "stream": refused(parallel="directions", train_dataset=Stream()),
        "grid": refused(parallel="both", parallel_directions=3),
        "backward": refused(parallel="directions", estimator="backprop"),
    }


def main(folder: Path, runs: list[dict[str, Any]]) -> None:
    """All runs, each in processes of its own world.

    Args:
        folder: of runs and results.
        runs: world, and name -> arguments of :func:`train` (``folder`` in it, too), or "refusals".
    """
    import transformers

    import zoft.run.train
    import zoft.trainer.trainer  # noqa: F401  # what is slow about a start
    from scripts.bench_scale import in_processes

    assert transformers.LlamaForCausalLM
    for run in runs:
        for given in run["cases"].values():
            composed(METHODS[given["method"]][0] if given != "refusals" else "mezo")
    gc.collect()
    gc.freeze()  # the Trainer collects before every training, and what imports made is not looked through for it
    for number, run in enumerate(runs):
        world = run["world"]

        def call(run: dict[str, Any] = run, world: int = world) -> dict[str, Any]:
            results: dict[str, Any] = {}
            for name, given in run["cases"].items():
                if given == "refusals":
                    results[name] = refusals()
                else:
                    results[name] = train(**{"world": world, **given, "folder": folder / given.get("folder", name)})
            return results

        (folder / f"{number}.json").write_text(json.dumps(in_processes(world, call)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
