"""One run from its config: load, evaluate zero-shot, train, evaluate, save, report."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.engines._elsewhere import Elsewhere
from zoft.errors import DiskFullError, Requeued, UserError, os_error_of
from zoft.lm import formats
from zoft.lm.models.files import placed
from zoft.run import folder
from zoft.run.build import (
    METRICS,
    _has_cuda,
    arguments_of,
    load_fitting,
    load_rows,
    make_trainer,
    metric_of,
    require_fit,
    require_trackers,
)
from zoft.run.facts import costs_of, facts_of, health_of, is_chat, opening_lines, scores_of, scores_text
from zoft.run.verdict import gain_of, keep_rows, kept_line, next_lines, row_values, verdict_line
from zoft.utils.words import counted

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.report.memory import PeakMemory
    from zoft.run.auto import AutoSettings
    from zoft.run.shared import Shared
    from zoft.trainer.trainer import ZOTrainer

_FEW_QUERIES = 200
"""A run of fewer queries is not timed: it is short, or its bar soon shows that it is not."""

Opening = Callable[["ZoftConfig", dict[str, list[Any]]], list[str]]
"""(config, encoded rows by split) -> lines that are shown before the weights are loaded."""


def run(
    cfg: ZoftConfig, callbacks: Sequence[Any] = (), opening: Opening | None = None, shared: Shared | None = None
) -> dict[str, Any]:
    """Carry out one run in its folder; a run that is there already is resumed, a finished one is shown.

    Args:
        cfg: what `zoft.config.compose` gives.
        callbacks: the caller's own (``transformers.TrainerCallback``), heard after the run's.
        opening: says something of the run before its weights are loaded.
        shared: what an earlier run of this process has loaded, and a later one may use.

    Returns:
        The facts of the report: zero-shot and final metric, queries, seconds, memory, ...

    Raises:
        UserError: something in the config cannot work; the folder is left as it was found.
        KeyboardInterrupt: the user stopped the run; a checkpoint to resume from has been written.
    """
    from zoft.config import resolved_yaml

    # each process runs this; the first one writes, says and decides
    first = int(os.environ.get("RANK", "0")) == 0
    nearest_folder = folder.nearest(cfg.output_dir)
    # before anything is loaded: a folder with another run in it is refused at once
    standing = _claim(cfg, resolved_yaml(cfg), first)
    if standing == "done":
        return _show_finished(cfg.output_dir)
    try:
        try:
            trainer, splits, memory = _prepare(cfg, opening, shared)
            for callback in callbacks:
                trainer.add_callback(callback)
        # a run that could not begin leaves the folder as it was found
        except BaseException:
            if first and standing == "new":
                folder.release(cfg.output_dir, nearest_folder)
            raise
        return _train(cfg, trainer, splits, memory, standing)
    finally:
        if first:
            folder.unlock(cfg.output_dir)


def _train(
    cfg: ZoftConfig, trainer: ZOTrainer, splits: dict[str, list[Any]], memory: PeakMemory, standing: str
) -> dict[str, Any]:
    """Carry the run out; the signal handler and the trackers are given back whatever happens."""
    try:
        return _carry_out(cfg, trainer, splits, memory, resuming=standing == "resume")
    except Exception as error:
        # a full disk shows in many places, as an error of torch or safetensors too
        disk_error = _of_disk(error, cfg.output_dir)
        if disk_error is None:
            raise
        raise disk_error from None
    finally:
        from zoft.report.trackers import close_trackers
        from zoft.trainer.signals import StopOnInterrupt

        close_trackers()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StopOnInterrupt):
                callback.close()  # a run that failed must not keep the next one's Ctrl-C


def _of_disk(error: Exception, output_dir: str) -> UserError | None:
    """A disk that is full, or a folder that has gone, as a sentence; None for everything else that can happen."""
    said, place = os_error_of(error), Path(output_dir).absolute()
    if said is None:
        return None
    named = said.filename if isinstance(said.filename, str) else ""
    # an error of another file (a cache, the user's data) is not about the run's folder
    ours = place in Path(named).absolute().parents
    return DiskFullError.of(said, Path(named) if ours else place, 0) if ours or said.errno == errno.ENOSPC else None


def _claim(cfg: ZoftConfig, resolved: str, first: bool) -> str:
    """The first process decides about the folder and the others hear of it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # one process: no rendezvous, and accelerate need not be imported yet
    if world == 1:
        return folder.claim(cfg.output_dir, resolved)
    cfg.check_processes(world)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from zoft.trainer.config import ZOConfig
    from zoft.trainer.ranks import require_same
    from zoft.trainer.restarts import meeting

    # The processes meet here: what ZOConfig says later of how long to wait for each other would come too late.
    wait = float(cfg.trainer.get("ddp_timeout") or ZOConfig.ddp_timeout)
    PartialState(cpu=not _has_cuda(), **meeting(wait))
    require_same({"config": resolved})
    answer: list[Any] = [None]
    if first:
        try:
            answer = [folder.claim(cfg.output_dir, resolved)]
        except UserError as error:
            answer = [error]
    standing = broadcast_object_list(answer)[0]
    if isinstance(standing, UserError):
        raise standing
    return str(standing)


def _prepare(
    cfg: ZoftConfig, opening: Opening | None, shared: Shared | None
) -> tuple[ZOTrainer, dict[str, list[Any]], PeakMemory]:
    """Everything up to the first query; nothing but the config has been written when this fails."""
    require_fit(cfg)  # before a row is read, which may have to be fetched
    require_trackers(cfg)
    if isinstance(cfg.engine, Elsewhere):
        cfg.engine.prepare()
    splits = cfg.task.load()  # what is wrong with the data is said before anything heavy is imported
    formats.format_of(cfg.task, splits.train, formats.settled(cfg.task, splits.train, cfg.objective))
    placed(cfg.model.name)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import zoft.trainer.trainer  # noqa: F401  # with what it brings it is part of what is held before the model
    from zoft.report.console import ProgressCallback
    from zoft.report.memory import PeakMemory
    from zoft.report.metrics import MetricsCallback
    from zoft.report.text import say
    from zoft.report.trackers import TrackerAxisCallback, forgive_trackers, keep_in_folder
    from zoft.report.ungraded import UngradedCallback
    from zoft.trainer.signals import StopOnInterrupt

    args = arguments_of(cfg)
    keep_in_folder(args)
    tokenizer, rows = load_rows(cfg, splits) if shared is None else shared.of(cfg, splits)
    if opening is not None and args.process_index == 0:
        for line in opening(cfg, rows):
            say(line)
    # the process's size before the model: what a run of any method would hold
    base_mb = PeakMemory("cpu").current_mb() if args.device.type == "cpu" else 0.0
    base_mb = base_mb if shared is None else shared.held_before(base_mb)
    model = load_fitting(cfg, tokenizer, rows) if shared is None else shared.model(cfg)
    chosen = _chosen(cfg, args, model, tokenizer, rows)
    trainer = make_trainer(cfg, args, model, tokenizer, rows)
    # parts that do not go together are an error here, before the folder says that a run has begun
    trainer.create_optimizer()
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    forgive_trackers(trainer.callback_handler.callbacks)
    trainer.progress.num_queries = chosen.queries if chosen else 0
    memory, costs = PeakMemory(str(args.device)), costs_of(trainer)
    trainer.peak_memory_mb, memory.base_mb = memory.peak_mb, base_mb
    measuring = _diagnostics(cfg)
    for callback in (
        MetricsCallback(lambda: trainer.journal.end),
        TrackerAxisCallback(),
        UngradedCallback(),
        StopOnInterrupt(),
        ProgressCallback(
            sum(costs) / len(costs),
            before=trainer.progress.num_queries,
            peak_mb=memory.peak_mb,
            snr=lambda: None if measuring is None else measuring.snr,
        ),
        health_of(cfg, trainer, rows),
        *([] if measuring is None else [measuring]),
    ):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        for line in [*opening_lines(cfg, trainer, rows), *([chosen.line()] if chosen else [])]:
            say(line)
    return trainer, rows, memory


def _diagnostics(cfg: ZoftConfig) -> Any:
    """What measures the estimates; None where nothing is to be measured."""
    if not cfg.diagnostics.every:
        return None
    from zoft.diagnostics import DiagnosticsCallback

    return DiagnosticsCallback(**vars(cfg.diagnostics))


def _chosen(cfg: ZoftConfig, args: Any, model: Any, tokenizer: Any, rows: dict[str, list[Any]]) -> AutoSettings | None:
    """What the run chooses by itself, once in its life; the steps are those that the rest of the budget pays for."""
    if not cfg.auto:
        return None
    from zoft.run.auto import choose

    if args.world_size > 1:
        raise UserError(f"{cfg.auto[0]}=auto is chosen in one process: start the run without torchrun, or give a value")
    chosen = choose(cfg, model, tokenizer, rows)
    # what the choice has cost is part of the budget
    if (left := cfg.budget.queries - chosen.queries) < cfg.composition.queries_at(0):
        raise UserError(f"{cfg.auto[0]}=auto takes {chosen.queries} queries: raise budget.queries, or give a value")
    args.max_steps = cfg.composition.steps_within(left)
    return chosen


def _carry_out(
    cfg: ZoftConfig, trainer: ZOTrainer, rows: dict[str, list[Any]], memory: PeakMemory, *, resuming: bool
) -> dict[str, Any]:
    from zoft.config import own
    from zoft.report import results
    from zoft.report.health import HealthCallback, warn_unmoved
    from zoft.report.plots import learning_curve
    from zoft.report.report import summary_lines, write_report
    from zoft.report.text import say
    from zoft.trainer.signals import StopOnInterrupt
    from zoft.weights.tensors import Weights

    first = trainer.is_world_process_zero()
    known = known_steps(cfg.output_dir) if resuming else None
    zero_shot_file = Path(cfg.output_dir) / results.ZERO_SHOT
    if first and resuming:
        found = (
            "nothing was saved yet: starting over"
            if known is None
            else f"{counted(known, 'steps')} {'is' if known == 1 else 'are'} known"
        )
        say(f"resume  {found}")
    _say_if_long(trainer, rows, known or 0)
    keep_reference(trainer, rows)
    seconds_prefix = _fill_frozen_prefix(trainer, rows)
    # a sample of millions would not see the few coordinates of a step
    is_unknown = resuming or trainer.stages.is_pipeline or cfg.subspace.name() == "coordinate"
    before = None if is_unknown else Weights(trainer.model).sample()
    # the peak of the zero-shot evaluation is inference's; that of training is taken anew below
    memory.reset()
    metric, final_file = metric_of(cfg, rows), Path(cfg.output_dir) / results.FINAL
    zero_shot = _held_out(trainer, rows["test"], zero_shot_file, "zero-shot", memory, metric)
    # what is logged first may be of a ruined model
    next(c for c in trainer.callback_handler.callbacks if isinstance(c, HealthCallback)).first = zero_shot.get("loss")
    memory.reset()
    # steps that are known come from the journal, and a new run begins at its first query
    trainer.train(resume_from_checkpoint=None if known is None else True)
    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnInterrupt) and c.stopped]
    if stops:
        if first:
            say(f"stopped after {counted(trainer.state.global_step, 'steps')}; the same command goes on from there")
        raise Requeued if stops[0].requeue else KeyboardInterrupt  # 75: a scheduler is to start it again
    if first and (kept := kept_line(trainer.args, trainer.state)) is not None:
        say(kept)
    # before the final evaluation, whose batches may be larger than training's
    peak = memory.peak_mb()
    final = _held_out(trainer, rows["test"], final_file, "final", memory, metric)
    # a model that does not fit is refused before the one of an earlier try is replaced
    if first:
        trainer.checkpoints.refuse_full_disk(Path(cfg.output_dir) / "model")
    save_model(trainer, Path(cfg.output_dir) / "model")
    facts = facts_of(cfg, trainer, len(rows["test"]), seconds_prefix) | scores_of(metric, zero_shot, final)
    facts |= {"peak_memory_mb": peak, "inference_peak_mb": zero_shot["peak_memory_mb"]}
    if facts.get("backprop_estimate_mb"):  # like with like: the process would hold the same libraries
        facts["backprop_estimate_mb"] += memory.base_mb
    gain = gain_of(metric, zero_shot_file, final_file) if first else None
    if gain is not None:
        facts |= {"gain": gain[0], "gain_interval": gain[1:]}
    if first:
        if before is not None:
            partial, rate = cfg.subspace.name() in ("blocks", "sparse", "vectors"), trainer.args.learning_rate
            flat = trainer.last_step is not None and trainer.last_step.norm == 0
            after = Weights(trainer.model).sample()
            warn_unmoved(before, after, facts["num_steps"], rate, partial=partial, flat=flat)
        learning_curve(
            cfg.output_dir,
            title=Path(cfg.output_dir).name,
            zero_shot=zero_shot.get("perplexity", facts["zero_shot"]),
            num_eval_rows=len(rows["dev"]),
            metric="perplexity" if "perplexity" in zero_shot else metric,
            final=final.get("perplexity", facts["final"]),
        )
        write_report(cfg.output_dir, facts)
        for line in summary_lines(facts):
            say(line)
        if gain is not None:
            say(verdict_line(metric, gain, len(rows["test"])))
        say(f"run     {cfg.output_dir}: report.md, curve.png, metrics.csv, model/")
        chooses = formats.format_of_row(rows["train"][0]) in ("options", "mask", "head")
        for line in next_lines(cfg.output_dir, chats=is_chat(cfg), chooses=chooses, own=own.words(cfg)):
            say(line)
    return facts


def _say_if_long(trainer: ZOTrainer, rows: dict[str, list[Any]], known: int) -> None:
    """Time a few queries at the weights as they are, and say so where the rest of the run takes over an hour."""
    from zoft.report.pace import long_run_line, seconds_per_query
    from zoft.report.text import say

    # queries of a step, from the budget: directions differ from method to method
    cost = trainer.args.budget_queries / trainer.args.max_steps
    left = round((trainer.args.max_steps - known) * cost)
    # a process of a pipeline cannot time a query by itself
    if not trainer.is_world_process_zero() or left < _FEW_QUERIES or trainer.stages.is_pipeline:
        return
    prefix = trainer.query_forward.frozen_prefix  # a query begins above it; the timed ones do not
    share = 1.0 if prefix is None else 1 - prefix.first / len(prefix.blocks)
    line = long_run_line(share * seconds_per_query(lambda: clean_query(trainer, rows["train"])), left)
    if line is not None:
        say(line)


def clean_query(trainer: ZOTrainer, rows: list[Any]) -> None:
    """The forwards of one query at the weights as they are; nothing of the run's state moves."""
    import torch

    from zoft.lm.logits.support import no_trials

    args = trainer.args
    trainer.model.eval()
    for number in range(args.gradient_accumulation_steps):
        # as large as a step's micro-batch; a short data set lends its first row
        chosen = rows[number * args.per_device_train_batch_size :][: args.per_device_train_batch_size] or rows[:1]
        with torch.no_grad(), trainer.compute_loss_context_manager(), no_trials():
            trainer.compute_loss(trainer.model, trainer.collated(chosen))


def save_model(trainer: ZOTrainer, target: Path) -> None:
    """Save the model, whole or not at all; a folder or link that is there makes room."""
    from zoft.journal import snapshot

    # every process calls it, since saving may gather weights; the first one writes
    if not trainer.is_world_process_zero():
        trainer.save_model(str(target))
        return
    with snapshot.replaced(target) as folder:
        trainer.save_model(str(folder))


def known_steps(output_dir: str) -> int | None:
    """How many steps the folder knows, by its journal or else its newest checkpoint; None where it has neither."""
    from zoft.journal import file as journal
    from zoft.journal import snapshot

    path = Path(output_dir) / journal.NAME
    if path.is_file():
        return journal.read(path).end
    newest = snapshot.newest(Path(output_dir))
    return None if newest is None else snapshot.step_of(newest)


def keep_reference(trainer: ZOTrainer, rows: dict[str, list[Any]]) -> None:
    """Log-probabilities of preference pairs under the model before training, once for all rows; else nothing."""
    if formats.format_of_row(rows["train"][0]) != "pairs":
        return
    from zoft.lm.objectives.preference import keep_reference

    trainer.model.eval()
    # every split: an evaluation reports the same loss
    for part in rows.values():
        with trainer.compute_loss_context_manager():
            list(keep_reference(trainer.model, part, trainer.data_collator, trainer.args.per_device_eval_batch_size))


def _fill_frozen_prefix(trainer: ZOTrainer, rows: dict[str, list[Any]]) -> float | None:
    """Seconds for hidden states that never change, computed once for all rows; None where every block is trained."""
    forward, began = trainer.query_forward, time.perf_counter()
    if forward.frozen_prefix is None:
        return None
    from tqdm import tqdm

    total = sum(map(len, rows.values()))
    label = f"hidden states below block {forward.frozen_prefix.first}, once for the whole run"
    with tqdm(total=total, unit="row", desc=label, disable=not trainer.is_world_process_zero(), mininterval=5) as bar:
        for done in forward.fill_prefix(*rows.values()):
            bar.update(done - bar.n)
    return time.perf_counter() - began


def _held_out(
    trainer: ZOTrainer, rows: list[Any], file: Path, name: str, memory: PeakMemory, metric: str
) -> dict[str, float]:
    """The metric on the held-out rows at these weights; a resumed run finds the earlier answer in its folder."""
    from zoft.report.results import WEIGHTS, read_results, write_results
    from zoft.report.text import say

    identity = trainer.journal.identity
    rows_now = identity.settings()["test_data"]
    # an earlier answer holds for these weights, this base and these rows only
    of = {WEIGHTS: trainer.stages.digest(), "frozen": identity.frozen_fingerprint(), "rows": rows_now}
    known = read_results(file, of) if trainer.args.world_size == 1 else None
    if known is not None:  # with more processes, all must do the same whatever disk they see
        return known
    output = trainer.predict(rows, metric_key_prefix="test")
    reported = {f"test_{name}" for names in METRICS.values() for name in names}
    values = {key.removeprefix("test_"): float(value) for key, value in output.metrics.items() if key in reported}
    values["peak_memory_mb"] = memory.peak_mb()
    if trainer.is_world_process_zero():
        write_results(file, values, of)
        keep_rows(file, row_values(metric, output.predictions, output.label_ids), of)
        say(f"{name:<9} held-out {scores_text(values)} on {counted(len(rows), 'rows')}")
    return values


def _show_finished(output_dir: str) -> dict[str, Any]:
    from zoft.report.report import summary_lines
    from zoft.report.results import finished
    from zoft.report.text import say

    facts = finished(Path(output_dir))
    assert facts is not None  # the claim has said so
    say(f"{output_dir} holds this run, finished (a larger budget.queries goes on); choose another output_dir or seed")
    for line in summary_lines(facts):
        say(line)
    return facts
