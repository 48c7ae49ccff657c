"""Carrying out one cell: train, keep the best checkpoint by the dev rows, look at the test rows once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from zoft.bench.choosing import best_of
from zoft.bench.ledger import Row
from zoft.bench.plan import MODES, Cell, Plan
from zoft.diagnostics import DiagnosticsCallback
from zoft.diagnostics.record import read_rows
from zoft.errors import NonFiniteLossError
from zoft.report.trackers import close_trackers
from zoft.run.shared import Shared

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.trainer.trainer import ZOTrainer

DIAGNOSED = ("cosine", "cosine_by_chance", "norm_ratio", "snr", "gram_effective_rank", "fd_error_at_eps")
"""What a row keeps of a run's diagnostics, where the bench's base asks for them (``diagnostics=full``)."""


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
        row = _evaluated(plan, cell, work)
    else:
        try:
            row = _trained(plan, [*plan.arguments(cell), f"trainer.run_name={cell.name}"], work, shared)
        finally:
            close_trackers()  # the next cell's numbers belong to a run of their own
    return about | row


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
    from zoft.run.train import known_steps

    cfg = compose([*arguments, f"output_dir={work}"])
    tokenizer, rows = shared.of(cfg)
    metric = formats.reported(formats.format_of_row(rows["test"][0]), cfg.task)
    steps = cfg.composition.steps_within(plan.queries)
    trainer = _trainer(cfg, plan, metric, steps, tokenizer, rows, shared.model(cfg))
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
        "queries_a_step": trainer.method.queries_at(1),
        "steps": trainer.progress.steps,
        "trained": trainer.zo_optimizer.session.weights.num_elements,
        "peak_memory_mb": peak,
        "memory_before_mb": before,
        "seconds": trainer.progress.seconds,
        "failed": failed,
        "test": None,
        "num_test": len(rows["test"]),
    }
    if cfg.diagnostics.every:
        row["diagnostics"] = _diagnosed(work)
    scores = _Tests(trainer, plan.select, rows["test"])
    if not failed:
        row["test"] = scores.within(row, plan.queries)
    if plan.budgets:
        row["at_budgets"] = {str(budget): _at_budget(row, budget, scores) for budget in sorted(plan.budgets)}
    return row


def _at_budget(row: Row, budget: int, scores: _Tests) -> Row:
    """What a row says where the run would have ended earlier; one that diverged later has not done so."""
    reached = any(point["queries"] > 0 for point in row["curve"] if point["queries"] <= budget)
    marked = row | {"failed": "" if row["queries"] >= budget else row["failed"]}
    if marked["failed"] or not reached:
        return {"failed": marked["failed"] or "was not evaluated", "test": None}
    return {"failed": "", "test": scores.within(marked, budget)}


class _Tests:
    """Test scores of a run's checkpoints, each computed once.

    Args:
        trainer: after training; its weights become the checkpoint's.
        select: what the best point is chosen by on the dev rows.
        test: the rows.
    """

    def __init__(self, trainer: ZOTrainer, select: str, test: list[Any]) -> None:
        self.trainer, self.select, self.test = trainer, select, test
        self._of: dict[float, dict[str, float]] = {}

    def within(self, row: Row, budget: int) -> dict[str, float]:
        """The test scores of the best point within a budget."""
        curve = [point for point in row["curve"] if point["queries"] <= budget]
        best = best_of(curve, row["metric"], self.select)
        assert best is not None
        if best["queries"] not in self._of:
            self.trainer.checkpoints.put_back(int(best["step"]))
            scores = self.trainer.predict(self.test, metric_key_prefix="test").metrics
            self._of[best["queries"]] = {name.removeprefix("test_"): value for name, value in scores.items()}
        return dict(self._of[best["queries"]])


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
        "save_total_limit": None if plan.budgets else 1,
        "logging_steps": steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": select,
        "greater_is_better": select != "loss",
    }
    trainer = make_trainer(cfg, arguments_of(cfg), model, tokenizer, rows)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # the trainer's own steps: node directions may have found that they need no probes, and take more of them
    for name in ("eval_steps", "save_steps", "logging_steps"):
        setattr(trainer.args, name, trainer.args.max_steps)
    ends = [trainer.method.steps_within(budget) for budget in plan.budgets]
    trainer.add_callback(Milestones(trainer.args.max_steps, plan.evaluations, ends))
    if cfg.diagnostics.every:
        trainer.add_callback(DiagnosticsCallback(**vars(cfg.diagnostics), draw=False))
    keep_reference(trainer, rows)
    return trainer


class Milestones(TrainerCallback):
    """Evaluates and saves at points evenly spaced along a run, the end among them.

    Args:
        steps: of the run.
        number: of points; fewer where there are fewer steps.
        also: further steps to do it at.

    Example:
        >>> sorted(Milestones(10, 4).at)
        [2, 5, 8, 10]
    """

    def __init__(self, steps: int, number: int, also: Iterable[int] = ()) -> None:
        self.at = {max(1, round(steps * i / number)) for i in range(1, number + 1)} | set(also)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for an evaluation and a checkpoint at one of the points."""
        if state.global_step in self.at:
            control.should_evaluate = control.should_save = True


def _diagnosed(work: Path) -> dict[str, float]:
    """Means over a run of what its diagnostics measured, of the cosine by its size."""
    diagnosed: dict[str, float] = {}
    for name in DIAGNOSED:
        values = [abs(float(line[name])) for line in read_rows(work) if line.get(name)]
        values = [value for value in values if math.isfinite(value)]
        if values:
            diagnosed[name] = sum(values) / len(values)
    return diagnosed


def _curve(history: list[dict[str, Any]], metric: str) -> list[dict[str, float]]:
    """Dev scores along a run: queries, loss and metric; a point that was computed again counts once."""
    points = {
        line["num_queries"]: {
            "queries": line["num_queries"],
            "step": line["step"],
            "loss": line["eval_loss"],
            metric: line[f"eval_{metric}"],
        }
        for line in history
        if "eval_loss" in line
    }
    return [points[queries] for queries in sorted(points)]
