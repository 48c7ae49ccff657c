"""Facts about a run: for its opening lines and for its report."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError
from zoft.lm import formats
from zoft.run import folder
from zoft.run.build import metric_of, trainable_of
from zoft.utils.words import counted
from zoft.version import __version__

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.report.health import HealthCallback
    from zoft.trainer.trainer import ZOTrainer


def opening_lines(cfg: ZoftConfig, trainer: ZOTrainer, rows: dict[str, list[Any]]) -> list[str]:
    """What is about to happen, for the console."""
    from zoft.estimators.nodes import Nodes

    trained = trainer.stages.num_trained
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    percent = f"{100 * trained / total:.3g} %"
    costs = costs_of(trainer)
    sizes = ", ".join(f"{len(data):,} {name}" for name, data in rows.items())
    estimator = trainer.method.estimator
    law, q, eps = _drawn(cfg, trainer)
    subspace = cfg.subspace.name() + (f" ({law})" if law else "")
    directions = "" if q is None else f" (q={q}, eps={eps:g})" if eps else f" (q={q})"
    if isinstance(estimator, Nodes) and q is None and not estimator.backpropagates:
        directions = " (no probes)"
    return [
        f"model   {cfg.model.name}: {total:,} weights, {trained:,} trained ({percent}), {cfg.model.dtype}",
        f"task    {cfg.task.name()}: {sizes} rows",
        *([cfg.chosen] if cfg.chosen else []),
        f"method  subspace={subspace}, estimator={cfg.estimator.name()}{directions}, "
        f"weighting={cfg.weighting.name()}, optimizer={cfg.optimizer.name()} "
        f"(lr={trainer.args.learning_rate:g}), engine={trainer.engine_name}",
        f"budget  {counted(cfg.budget.queries, 'queries')} = {counted(trainer.args.max_steps, 'steps')} of "
        + " or ".join(map(str, sorted(set(costs)))),
    ]


def _drawn(cfg: ZoftConfig, trainer: ZOTrainer) -> tuple[str | None, int | None, float | None]:
    """Law, number and radius of a step's directions; None where no direction is drawn."""
    estimator = trainer.method.estimator
    is_known = getattr(estimator, "response", "") == "identity" or getattr(estimator, "feedback", "") == "exact"
    if is_known or (estimator.backpropagates and not estimator.radius):
        return None, None, None
    law = getattr(cfg.subspace, "directions", cfg.subspace.law)  # of nodes: orthogonal, or iid
    return law, estimator.num_directions, estimator.radius or None


def more_of(cfg: ZoftConfig, trainer: ZOTrainer) -> str:
    """The setting by which a step asks of more directions; empty where it asks of none."""
    if _drawn(cfg, trainer)[0] is None:
        return ""
    return "estimator.num_directions" if getattr(trainer.method.estimator, "every", 1) else "estimator.first"


def costs_of(trainer: ZOTrainer) -> list[int]:
    """Queries of every step of the run."""
    return [trainer.method.queries_at(step) for step in range(trainer.args.max_steps)]


def scores_text(values: dict[str, float]) -> str:
    """The metric and its interval, for the console."""
    if "perplexity" in values:
        interval = f"[{values['loss_low']:.3f}, {values['loss_high']:.3f}]"
        return f"loss {values['loss']:.3f} {interval} (perplexity {values['perplexity']:.2f})"
    for metric in ("f1", "reward"):
        if metric in values:
            return f"{metric} {values[metric]:.3f} [{values[f'{metric}_low']:.3f}, {values[f'{metric}_high']:.3f}]" + (
                f", exact match {values['exact_match']:.3f}" if "exact_match" in values else ""
            )
    low, high = 100 * values["accuracy_low"], 100 * values["accuracy_high"]
    return f"accuracy {100 * values['accuracy']:.1f} % [{low:.1f}, {high:.1f}]"


def scores_of(metric: str, zero_shot: dict[str, float], final: dict[str, float]) -> dict[str, Any]:
    """What was reached, as the report's facts; an accuracy's interval is computed there."""
    facts: dict[str, Any] = {"metric": metric}
    for name, values in (("zero_shot", zero_shot), ("final", final)):
        facts[name] = values[metric]
        if metric != "accuracy":
            facts[f"{name}_interval"] = (values[f"{metric}_low"], values[f"{metric}_high"])
        if metric == "loss":
            facts[f"{name}_perplexity"] = values["perplexity"]
    return facts


def _settings(cfg: ZoftConfig, trainer: ZOTrainer) -> dict[str, Any]:
    """How the run was trained: its parts by name, its rates and its batch."""
    from zoft.config import own

    groups = ("subspace", "estimator", "weighting", "optimizer", "objective", "peft")
    trained = trainable_of(cfg)
    return {group: getattr(cfg, group).name() for group in groups} | {
        "trainable": trained.name() if trained.name() != "auto" else "all" if cfg.peft.name() == "none" else "adapter",
        "trainable_settings": vars(trained) or None,
        "optimizer_settings": {k: v for k, v in vars(cfg.optimizer).items() if k != "learning_rate" and v is not None},
        "function": ", ".join(word.partition("=")[2] for word in own.code_words(cfg)) or None,
        "engine": trainer.engine_name,
        **dict(zip(("law", "num_directions", "eps"), _drawn(cfg, trainer), strict=True)),
        "response": getattr(trainer.method.estimator, "response", None),
        "learning_rate": trainer.args.learning_rate,
        "lr_scheduler_type": str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)),
        "batch_size": trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps,
        "num_train_rows": len(trainer.train_dataset),
        "data": getattr(cfg.task, "train", "") or cfg.task.name(),
        "read_as": _read_as(cfg),
        "template": getattr(cfg.task, "template", "") or None,
    }


def _read_as(cfg: ZoftConfig) -> dict[str, Any] | None:
    """How rows of one's own are read; None for other tasks, and where the file has gone since."""
    from zoft.lm.tasks.custom import Custom

    try:
        return cfg.task.remembered() if isinstance(cfg.task, Custom) else None
    except UserError:
        return None


def facts_of(cfg: ZoftConfig, trainer: ZOTrainer, num_rows: int, seconds_prefix: float | None) -> dict[str, Any]:
    """What the report says, as numbers."""
    from zoft.config import own
    from zoft.engines._prefix import num_below
    from zoft.report import ungraded
    from zoft.report.backprop import backprop_estimate_mb, model_shape

    num_trained, progress = trainer.stages.num_trained, trainer.progress
    batch = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    shape = model_shape(trainer.model, num_trained)
    if shape is not None:  # a backward pass ends at the lowest trained block
        shape.num_layers -= num_below(trainer.model)
    return {
        "run_name": Path(cfg.output_dir).name,
        "model": cfg.model.name,
        "task": cfg.task.name(),
        "method": cfg.method,
        **_settings(cfg, trainer),
        "device": str(trainer.args.device),
        "dtype": cfg.model.dtype,
        "quantization": cfg.model.quantization,
        "seed": cfg.seed,
        "num_eval_rows": num_rows,
        "num_queries": progress.num_queries,
        "budget_queries": cfg.budget.queries,
        "num_steps": progress.steps,
        "kept_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        "num_tokens": progress.num_tokens,
        "num_skipped_steps": progress.num_skipped,
        "num_ungraded": ungraded.count(Path(cfg.output_dir)),
        "seconds": progress.seconds,
        "seconds_forward": progress.seconds_forward,
        "seconds_other": progress.seconds - progress.seconds_forward,
        "seconds_prefix": seconds_prefix,
        "backprop_estimate_mb": backprop_estimate_mb(shape, batch=batch, seq=longest) if shape else None,
        "num_trainable": num_trained,
        "num_params": sum(p.numel() for p in trainer.model.parameters()),
        "weights_sha256": trainer.stages.digest(),
        "versions": {"zoft": __version__}
        | {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "peft", "datasets", "accelerate")
        },
        "command": shlex.join(
            [
                *("zoft", "train", f"config={Path(cfg.output_dir) / folder.CONFIG}"),
                *own.words(cfg),
                *own.code_words(cfg),
                f"output_dir={cfg.output_dir}-again",
            ]
        ),
    }


def is_chat(cfg: ZoftConfig) -> bool:
    """Whether the rows are conversations."""
    task: Any = cfg.task
    return hasattr(task, "reading") and (task.format if task.format != "auto" else task.reading().format) == "chat"


def _usual_rate(cfg: ZoftConfig) -> float:
    """The learning rate of the method's preset, or else what is usual for the optimizer."""
    from zoft.config.catalog import preset_files
    from zoft.config.experiments import read
    from zoft.trainer.rate import STARTS

    file = preset_files("method").get(str(cfg.method))
    usual = read(file, str(file)).get("optimizer", {}).get("learning_rate") if file else None
    return float(usual or STARTS.get(cfg.optimizer.name(), 1e-3))


def _chance(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> float | None:
    """The accuracy of a guess among the answers of a row; None where another metric is reported."""
    if metric_of(cfg, rows) != "accuracy":
        return None
    row, form = rows["dev"][0], formats.format_of_row(rows["dev"][0])
    counts = {"options": len(row.get("sequences", ())), "mask": len(row.get("word_ids", ())), "pairs": 2}
    # a guess among two at least: a row without options says nothing of chance
    return 1 / max(2, counts.get(form, formats.num_labels(cfg.task)))


def health_of(cfg: ZoftConfig, trainer: ZOTrainer, rows: dict[str, list[Any]]) -> HealthCallback:
    """What watches over the run, with what is usual of its method."""
    from zoft.report.health import HealthCallback

    return HealthCallback(
        _chance(cfg, rows),
        len(rows["dev"]),
        more_of=more_of(cfg, trainer),
        eps=cfg.estimator.radius,
        usual=_usual_rate(cfg),
        bounded=hasattr(cfg.optimizer, "trust"),
        has_adapter=cfg.peft.name() != "none",
        last_step=lambda: trainer.last_step,
    )
