"""Memory and time of a run: memory before any weight is loaded, time by a few steps where that is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.lm.data.lengths import length_of
from zoft.use.plan.memory import Memory, Size, num_moving_of, of_backprop, of_method

PROBED_STEPS = 3


@dataclass(frozen=True)
class RunEstimate:
    """The estimate of a run's memory and time.

    Args:
        model: the model's name.
        num_params: its weights.
        num_trainable: those that are trained.
        method: memory of this run.
        lora: memory of backpropagation through a LoRA.
        adamw: memory of backpropagation through all weights, with AdamW.
        device: where the model will be.
        free_mb: what is free there now.
        queries: of the budget.
        seconds: to the end of training, by a probe; None where none was asked for.
    """

    model: str
    num_params: int
    num_trainable: int
    method: Memory
    lora: Memory
    adamw: Memory
    device: str
    free_mb: float | None
    queries: int
    seconds: float | None = None


def estimate(cfg: ZoftConfig, *, probe: bool = False) -> RunEstimate:
    """Estimate a run.

    Args:
        cfg: the run's config; its data and its tokenizer are read, of its model the config alone.
        probe: whether the weights are loaded and three steps made, for the time.

    Raises:
        UserError: data, tokenizer or model cannot be read.
    """
    from zoft.lm.models.files import placed
    from zoft.lm.models.load import quiet
    from zoft.run.build import load_rows

    splits = cfg.task.load()
    placed(cfg.model.name)
    quiet()  # what is wrong with the data has been said by now: this imports transformers
    _, rows = load_rows(cfg, splits)
    estimated = of_rows(cfg, rows)
    return dataclasses.replace(estimated, seconds=seconds_of(cfg, rows)) if probe else estimated


def of_rows(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> RunEstimate:
    """The estimate for encoded rows; no weight is loaded and no step made."""
    from zoft.lm import formats
    from zoft.lm.models.meta import meta_model, quantize_on_meta
    from zoft.report.memory import PeakMemory
    from zoft.run.build import trainable_of
    from zoft.utils.lazy import torch

    model = meta_model(
        formats.model_kind(cfg.task),
        cfg.model.name,
        revision=cfg.model.revision,
        dtype=cfg.model.dtype,
        attention=cfg.model.attn_implementation,
        num_labels=formats.num_labels(cfg.task),
    )
    device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    import zoft.trainer.trainer  # noqa: F401  # with what it brings it is part of what a run's process holds

    host = PeakMemory("cpu").current_mb() if device == "cpu" else 0.0
    num_params = sum(p.numel() for p in model.parameters())
    size = size_of(cfg, rows)
    trained_on = size_of(cfg, {"train": rows["train"]})  # a long row of dev or test sees no backward pass
    lora, adamw = (of_backprop(model, trained_on, host, lora=lora) for lora in (True, False))
    with torch.device("meta"):
        wrapped = _wrapped(cfg, model)
    if cfg.model.quantization is not None:
        quantize_on_meta(wrapped, cfg.model.quantization)
    trainable_of(cfg).apply(wrapped)
    memory = of_method(cfg, wrapped, dataclasses.replace(size, kept_tokens=_kept(wrapped, rows)), host)
    trained = num_moving_of(cfg, wrapped)
    return RunEstimate(
        cfg.model.name, num_params, trained, memory, lora, adamw, device, free_mb(device), cfg.budget.queries
    )


def brief(estimated: RunEstimate) -> str:
    """The estimate in one line, for the beginning of a run."""
    from zoft.report.text import gib

    line = f"memory  about {gib(estimated.method.total_mb)} on {estimated.device} by estimate"
    if estimated.adamw.parts:
        lora, adamw = gib(estimated.lora.total_mb), gib(estimated.adamw.total_mb)
        line += f"; by backpropagation LoRA {lora}, AdamW on all weights {adamw}"
    if estimated.free_mb is None or estimated.method.total_mb - estimated.method.host_mb <= estimated.free_mb:
        return line
    return f"{line}; {gib(estimated.free_mb)} ARE FREE: take a smaller batch, or fewer tokens"


def of_run(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> list[str]:
    """The line of a run whose rows are encoded and whose weights are not loaded; none where it cannot be told."""
    try:
        return [brief(of_rows(cfg, rows))]
    except Exception as error:  # what a run cannot do it says itself, and better
        logging.getLogger(__name__).debug("no estimate: %s", error)
        return []


def size_of(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> Size:
    """How much goes through the model at a time."""
    every = [row for part in rows.values() for row in part]
    one_token = all("sequences" in row and set(row["lengths"]) == {1} for row in every)
    options = 1 if one_token else max(len(row.get("sequences", ())) or 1 for row in every)
    longest = max(length_of(row) for row in every)
    counted = max(_counted(row) for row in every)
    batch, eval_batch = (int(cfg.trainer.get(f"per_device_{name}_batch_size", 8)) for name in ("train", "eval"))
    sides = 2 if "chosen" in every[0] else 1
    return Size(batch * options * sides, eval_batch * options * sides, longest, counted)


def seconds_of(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> float:
    """Seconds to the end of training, by three steps of a run in a folder of its own; the first warms up."""
    from zoft.run.build import model_to_train, tokenizer_of
    from zoft.run.rehearsal import rehearsing, rehearsing_trainer

    costs = [cfg.composition.queries_at(step) for step in range(PROBED_STEPS)]
    budget, batch = cfg.budget.queries, int(cfg.trainer.get("per_device_train_batch_size", 8))
    few = rows["train"][: PROBED_STEPS * batch * int(cfg.trainer.get("gradient_accumulation_steps", 1))]
    with tempfile.TemporaryDirectory() as folder:
        cfg = rehearsing(cfg, folder, sum(costs))
        tokenizer = tokenizer_of(cfg)
        trainer = rehearsing_trainer(cfg, model_to_train(cfg, tokenizer), tokenizer, {**rows, "train": few})
        trainer.create_optimizer()
        began = time.perf_counter()
        for _ in trainer.query_forward.fill_prefix(few):
            pass
        filling = (time.perf_counter() - began) / len(few) * sum(map(len, rows.values()))
        ends = _timed_steps(trainer)
    per_query = (ends[-1] - ends[0]) / sum(costs[1:]) if len(ends) > 1 else ends[0] / costs[0]
    return (filling if trainer.query_forward.frozen_prefix is not None else 0.0) + per_query * budget


def _timed_steps(trainer: Any) -> list[float]:
    """When each step ended, on the clock since training began."""
    import transformers

    ends: list[float] = []
    began = time.perf_counter()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter() - began)

    trainer.add_callback(Clock())
    trainer.train()
    return ends


def free_mb(device: str) -> float | None:
    """MiB that are free on a device now; None where that cannot be known."""
    from zoft.utils.lazy import torch

    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info()[0]) / 2**20
    try:
        memory = importlib.import_module("psutil").virtual_memory()
    except ImportError:  # accelerate brings it
        return None
    return float(memory.available) / 2**20


def _wrapped(cfg: ZoftConfig, model: Any) -> Any:
    """With the adapter; a prefix begins at the model's activations, which a model without weights has none of."""
    peft: Any = cfg.peft
    if hasattr(peft, "init"):
        peft = dataclasses.replace(peft, init="random")
    return peft.wrap(model, cfg.seed)


def _kept(model: Any, rows: dict[str, list[Any]]) -> int:
    """Tokens whose hidden states are kept: all, where blocks below the lowest trained one are frozen."""
    from zoft.engines._frozen_prefix import FrozenPrefix
    from zoft.weights.tensors import Weights

    if FrozenPrefix.of(model, Weights(model, shapes_only=True), 1) is None:
        return 0
    return sum(length_of(row) for part in rows.values() for row in part)


def _counted(row: Any) -> int:
    """Positions of a row whose logits are computed."""
    if "chosen" in row:
        return max(_counted(row[side]) for side in ("chosen", "rejected"))
    if isinstance(row.get("labels"), list):
        return sum(label >= 0 for label in row["labels"])
    return max(row["lengths"]) if "lengths" in row else 1
