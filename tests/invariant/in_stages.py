"""What the processes of test_stages.py run: trainings through the stages of a pipeline, forked from one start.

`python -m tests.invariant.in_stages FOLDER RUNS` writes FOLDER/0.json, 1.json ...: what all processes of a run have.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "full": {"model": "llama", "estimator": ("central", 2)},
    "tied": {"model": "qwen", "estimator": ("central", 1), "optimizer": "momentum", "accumulated": 2, "decay": 0.1},
    "lora": {"model": "llama", "peft": True, "estimator": ("leave_one_out", 2), "bf16": True},
    "options": {"model": "opt", "objective": True, "estimator": ("one_sided", 1)},
    "search": {"model": "gpt2", "estimator": ("central", 2), "optimizer": "conservative"},
}
"""Name -> what is trained, and how."""


def option_rows(count: int) -> list[dict[str, Any]]:
    """Options of one or several tokens behind prompts of several lengths: hidden states of several sizes."""
    drawn, rows = random.Random(0), []
    for number in range(count):
        prompt = drawn.choices(range(4, 64), k=3 + number % 5)
        options = [drawn.choices(range(4, 64), k=size) for size in (1, 1 + number % 3)]
        sequences = [prompt + option for option in options]
        row = {"sequences": sequences, "lengths": list(map(len, options)), "input_ids": max(sequences, key=len)}
        rows.append(row | {"label": number % 2})
    return rows


def train(case: str, folder: Path, *, stop: int = 0, layers: int = 4, **given: Any) -> dict[str, Any]:
    """One training of four rows a step; goes on in ``folder`` where something of it is there already."""
    from transformers import TrainerCallback

    from tests import models
    from zoft import ZOConfig, ZOTrainer
    from zoft.component import create
    from zoft.lm.data.tokens import OptionCollator
    from zoft.lm.objectives.options import Options

    class StopAfter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop

    how = CASES[case]
    depth = {"n_layer": layers} if how["model"] == "gpt2" else {"num_hidden_layers": layers}
    model = getattr(models, f"tiny_{how['model']}")(**depth)
    batch = models.batch_for(model, rows=16, length=9)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(16)]
    chosen = {}
    if "objective" in how:
        rows = option_rows(16)
        chosen = {"objective": Options(), "data_collator": OptionCollator(models.PAD)}
    if "peft" in how:
        import torch
        from peft import LoraConfig

        torch.manual_seed(0)
        chosen["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    name, q = how["estimator"]
    accumulated = how.get("accumulated", 1)
    args = ZOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 // accumulated,
        gradient_accumulation_steps=accumulated,
        per_device_eval_batch_size=3,
        learning_rate=1e-3,
        weight_decay=how.get("decay", 0.0),
        bf16=how.get("bf16", False),
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        journal_hash_steps=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        **given,
    )
    trainer = ZOTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:7],
        estimator=create("estimator", name, "").__class__(eps=1e-2, num_directions=q),
        optimizer=how.get("optimizer", "sgd"),
        engine="layerwise",
        callbacks=[StopAfter()],
        **chosen,
    )
    trainer.train(resume_from_checkpoint=(folder / "journal.bin").exists() or None)
    trainer.save_model(str(folder / "model"))
    lines, held = trainer.state.log_history, trainer.stages.stage and trainer.stages.stage.held
    saved = list((folder / "model").glob("*.safetensors")) if args.process_index == 0 else []  # the first one writes
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.model.parameters()}
    return {
        "digest": trainer.stages.digest(),
        "saved": [hashlib.sha256(file.read_bytes()).hexdigest() for file in saved],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "slopes": [line.get("projected_grad") for line in lines if "loss" in line],
        "evaluated": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "bytes_sent": [line.get("bytes_sent") for line in lines if "loss" in line],
        "num_queries": trainer.progress.num_queries,
        "num_tokens": trainer.progress.num_tokens,
        "steps": trainer.state.global_step,
        "trained_here": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "trained": trainer.stages.num_trained,
        "held": sum(stored.values()),
        "whole": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "names": sorted(held.held[held.rank]) if held else [],
    }


def refused(make: Any = None, parts: dict[str, Any] | None = None, **given: Any) -> str:
    """The sentence that a training is refused with."""
    from tests import models
    from zoft import ZOConfig, ZOTrainer
    from zoft.errors import UserError

    args = {"max_steps": 1, "journal": False, "report_to": [], "use_cpu": True, "dataloader_pin_memory": False}
    model = (make or models.tiny_llama)()
    batch = models.batch_for(models.tiny_llama(), rows=4)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = ZOConfig(output_dir=folder, parallel="pipeline", **args, **given)
            chosen = {"estimator": "central", "train_dataset": rows, **(parts or {})}
            ZOTrainer(model, config, **chosen).create_optimizer()
        except UserError as error:
            return str(error)
    return ""


def refusals() -> dict[str, str]:
    """What two processes are not started for."""
    from tests import models
    from zoft.estimators.central import Central
    from zoft.subspaces.full import Full

    def single() -> Any:
        return models.tiny_llama(num_hidden_layers=1)

    def with_more() -> Any:
        model, seen = models.tiny_llama(), []
        model.model.embed_tokens.register_forward_hook(lambda _module, _args, output: seen.append(output.mean()))
        model.model.layers[2].register_forward_hook(lambda _module, _args, output: output + seen[-1])
        return model

    def last_block() -> Any:
        model = models.tiny_llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.2." in name)
        return model

    return {
        "nodes": refused(parts={"subspace": "nodes", "estimator": "nodes"}),
        "backward": refused(parts={"estimator": "backprop"}),
        "subspace": refused(parts={"subspace": "two_sided"}),
        "sphere": refused(parts={"subspace": Full(law="sphere")}),
        "noise": refused(parts={"estimator": Central(noise="torch_sequential")}),
        "weighting": refused(parts={"weighting": "align"}),
        "optimizer": refused(parts={"optimizer": "cone"}),
        "engine": refused(parts={"engine": "in_place"}),
        "texts": refused(parts={"objective": "reward"}),
        "rate": refused(learning_rate="auto"),
        "narrow": refused(narrow_last_block=True),
        "grid": refused(parallel_directions=2),
        "blocks": refused(single),
        "compiled": refused(torch_compile=True),
        "encoder": refused(models.tiny_t5),
        "trained": refused(last_block),
        "rows": refused(parts={"train_dataset": None}),
        "more": refused(with_more),
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
    gc.collect()
    gc.freeze()
    for number, run in enumerate(runs):

        def call(run: dict[str, Any] = run) -> dict[str, Any]:
            results: dict[str, Any] = {}
            for name, given in run["cases"].items():
                if given == "refusals":
                    results[name] = refusals()
                else:
                    results[name] = train(**{**given, "folder": folder / given.get("folder", name)})
            return results

        (folder / f"{number}.json").write_text(json.dumps(in_processes(run["world"], call)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
