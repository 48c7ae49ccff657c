"""Carrying out one cell: train, keep the best checkpoint by the dev rows, look at the test rows once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from zoft.bench.ledger import Row
from zoft.bench.plan import MODES, Cell, Plan
from zoft.diagnostics import DiagnosticsCallback
from zoft.diagnostics.record import read_rows
from zoft.errors import NonFiniteLossError
from zoft.report.trackers import close_trackers

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.engines._frozen_prefix import FrozenPrefix
    from zoft.trainer.trainer import ZOTrainer

DIAGNOSED = ("cosine", "cosine_by_chance", "norm_ratio", "snr", "gram_effective_rank", "fd_error_at_eps")
"""What a row keeps of a run's diagnostics, where the bench's base asks for them (``diagnostics=full``)."""


@dataclass
class Shared:
    """What a process keeps from cell to cell: a task's rows, and their hidden states below the trained blocks."""

    key: str = ""
    tokenizer: Any = None
    rows: dict[str, list[Any]] = field(default_factory=dict)
    objective: Any = None  # what objective=auto is for these rows
    prefixes: dict[str, FrozenPrefix] = field(default_factory=dict)

    def of(self, cfg: ZoftConfig) -> tuple[Any, dict[str, list[Any]]]:
        """(tokenizer, rows) of a run."""
        from zoft.run.build import load_rows

        key = repr((cfg.task, cfg.model, cfg.objective, cfg.estimator.noise))  # MeZO's own noise: its own tokens too
        if key != self.key:
            self.prefixes.clear()
            self.tokenizer, self.rows = load_rows(cfg)
            self.key, self.objective = key, cfg.objective
        cfg.settle(self.objective)
        return self.tokenizer, self.rows

    def prefix(self, trainer: ZOTrainer) -> None:
        """Fill the trainer's hidden states, with those of an earlier cell where the same blocks are frozen."""
        own = trainer.frozen_prefix
        if own is None:
            return
        key = f"{own.first} {trainer.args.bf16} {trainer.args.fp16}"
        if key in self.prefixes:
            own.share(self.prefixes[key])
        else:
            for _ in trainer.fill_frozen_prefix(*self.rows.values()):
                pass
            if own.usable:
                self.prefixes[key] = own


def run_cell(plan: Plan, cell: Cell, work: Path, shared: Shared) -> Row:
    """Carry a cell out.

    Args:
        plan: the bench.
        cell: which.
        work: a folder for what an interrupted run goes on from.
        shared: what this process knows of earlier cells.

    Returns:
        The cell's row: what it was, its dev scores along the way, the best checkpoint's test scores, what it cost.
    """
    about: Row = {
        "task": cell.task,
        "prompt": cell.prompt,
        "method": cell.method,
        "factor": cell.factor,
        "seed": cell.seed,
        "identity": plan.identity(cell),
    }
    if cell.method in MODES:
        made = _evaluated(plan, cell, work)
    else:
        try:
            made = _trained(plan, [*plan.arguments(cell), f"trainer.run_name={cell.name}"], work, shared)
        finally:
            close_trackers()  # the next cell's numbers belong to a run of their own
    return about | made


def _evaluated(plan: Plan, cell: Cell, work: Path) -> Row:
    from zoft.config import compose
    from zoft.evaluation.evaluate import Request, evaluate

    shown = plan.demonstrations if cell.method == "icl" else None
    facts = evaluate(compose(plan.shared_arguments(cell)), Request(mode=cell.method, k=shown, output_dir=str(work)))
    scores = {name: value for name, value in facts.items() if isinstance(value, float) and name != "seconds"}
    return {"metric": facts["metric"], "test": scores, "num_test": facts["num_rows"], "seconds": facts["seconds"]}


def _trained(plan: Plan, arguments: list[str], work: Path, shared: Shared) -> Row:
    from zoft.config import compose
    from zoft.lm import formats
    from zoft.report.memory import PeakMemory
    from zoft.run.build import load_model_of
    from zoft.run.train import known_steps

    cfg = compose([*arguments, f"output_dir={work}"])
    tokenizer, rows = shared.of(cfg)
    metric = formats.reported(formats.format_of_row(rows["test"][0]), cfg.task)
    steps = cfg.composition.steps_within(plan.queries)
    trainer = _trainer(cfg, plan, metric, steps, tokenizer, rows, load_model_of(cfg))
    trainer.create_optimizer()
    shared.prefix(trainer)
    memory = PeakMemory(str(trainer.args.device))
    memory.reset()
    before = memory.current_mb()
    failed = ""
    try:
        trainer.train(resume_from_checkpoint=None if known_steps(str(work)) is None else True)
    except NonFiniteLossError as error:
        failed = " ".join(str(error).split())
    peak = memory.peak_mb()
    row: Row = {
        "metric": metric,
        "learning_rate": trainer.args.learning_rate,
        "curve": _curve(trainer.state.log_history, metric),
        "queries": trainer.progress.num_queries,
        "queries_a_step": cfg.composition.queries_at(1),
        "steps": trainer.progress.steps,
        "trained": trainer.stepper.session.weights.num_elements,
        "peak_memory_mb": peak,
        "memory_before_mb": before,
        "seconds": trainer.progress.seconds,
        "failed": failed,
        "test": None,
        "num_test": len(rows["test"]),
    }
    if cfg.diagnostics.every:
        row["diagnostics"] = _diagnosed(work)
    if not failed:  # the Trainer has put the best checkpoint's weights back
        scores = trainer.predict(rows["test"], metric_key_prefix="test").metrics
        row["test"] = {name.removeprefix("test_"): value for name, value in scores.items()}
    return row


def _trainer(
    cfg: ZoftConfig, plan: Plan, metric: str, steps: int, tokenizer: Any, rows: dict[str, list[Any]], model: Any
) -> ZOTrainer:
    """A trainer as `zoft train` makes it, that evaluates and saves at the plan's points and keeps the best."""
    from zoft.run.build import arguments_of, make_trainer
    from zoft.run.train import keep_reference

    select = "loss" if plan.select == "loss" else metric
    cfg.trainer |= {
        "eval_strategy": "steps",
        "eval_steps": steps,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": steps,
        "save_total_limit": 1,
        "logging_steps": steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": select,
        "greater_is_better": select != "loss",
    }
    trainer = make_trainer(cfg, arguments_of(cfg), model, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Milestones(steps, plan.evaluations))
    if cfg.diagnostics.every:
        trainer.add_callback(DiagnosticsCallback(**vars(cfg.diagnostics), draw=False))
    keep_reference(trainer, rows)
    return trainer


class Milestones(TrainerCallback):
    """Evaluates and saves at points evenly spaced along a run, the end among them.

    Args:
        steps: of the run.
        number: of points; fewer where there are fewer steps.

    Example:
        >>> sorted(Milestones(10, 4).at)
        [2, 5, 8, 10]
    """

    def __init__(self, steps: int, number: int) -> None:
        self.at = {max(1, round(steps * i / number)) for i in range(1, number + 1)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At one of the points?"""
        if state.global_step in self.at:
            control.should_evaluate = control.should_save = True


def _diagnosed(work: Path) -> dict[str, float]:
    """Means over a run of what its diagnostics measured, of the cosine by its size."""
    found: dict[str, float] = {}
    for name in DIAGNOSED:
        values = [abs(float(line[name])) for line in read_rows(work) if line.get(name)]
        values = [value for value in values if math.isfinite(value)]
        if values:
            found[name] = sum(values) / len(values)
    return found


def _curve(history: list[dict[str, Any]], metric: str) -> list[dict[str, float]]:
    """Dev scores along a run: queries, loss and metric; a point that was computed again counts once."""
    points = {
        line["num_queries"]: {"queries": line["num_queries"], "loss": line["eval_loss"], metric: line[f"eval_{metric}"]}
        for line in history
        if "eval_loss" in line
    }
    return [points[queries] for queries in sorted(points)]
