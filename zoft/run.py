"""One run from its config: load, evaluate zero-shot, train, evaluate, save, report."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft import __version__, atomic, folder
from zoft.errors import DiskFullError, Requeued, UserError, did_you_mean, os_error_of

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.report.memory import PeakMemory
    from zoft.trainer import ZOTrainer

METRICS = {
    "accuracy": ("loss", "accuracy", "accuracy_low", "accuracy_high"),
    "loss": ("loss", "loss_low", "loss_high", "perplexity"),
    "f1": ("loss", "f1", "f1_low", "f1_high", "exact_match", "exact_match_low", "exact_match_high"),
    "exact_match": ("loss", "exact_match", "exact_match_low", "exact_match_high", "f1", "f1_low", "f1_high"),
    "reward": ("loss", "reward", "reward_low", "reward_high"),
}
"""What is reported -> all that an evaluation computes then."""

_FEW_QUERIES = 200
"""Below it no query is timed: a run of so few is not long, or says so soon enough by its bar."""


def run(cfg: ZoftConfig, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Carry out one run in its folder; a run that is there already is resumed, a finished one is shown.

    Args:
        cfg: what `zoft.config.compose` gives.
        callbacks: the caller's own, ``transformers.TrainerCallback``s, heard after the run's.

    Returns:
        The facts of the report: zero-shot and final metric, queries, seconds, memory, ...

    Raises:
        UserError: something in the config cannot work; the folder is left as it was found.
        KeyboardInterrupt: the user stopped the run; a checkpoint to resume from has been written.
    """
    from zoft.config import resolved_yaml

    first = int(os.environ.get("RANK", "0")) == 0
    there = folder.nearest(cfg.output_dir)
    standing = _claim(cfg, resolved_yaml(cfg), first)
    if standing == "done":
        return _show_finished(cfg.output_dir)
    try:
        try:
            trainer, splits, memory = _prepare(cfg)
            for callback in callbacks:
                trainer.add_callback(callback)
        except BaseException:
            if first and standing == "new":
                folder.release(cfg.output_dir, there)
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
        told = _of_disk(error, cfg.output_dir)
        if told is None:
            raise
        raise told from None
    finally:
        from zoft.interrupt import StopOnInterrupt
        from zoft.report.trackers import close_trackers

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
    ours = place in Path(named).absolute().parents
    return DiskFullError.of(said, Path(named) if ours else place, 0) if ours or said.errno == errno.ENOSPC else None


def _claim(cfg: ZoftConfig, resolved: str, first: bool) -> str:
    """The first process decides about the folder and the others hear of it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return folder.claim(cfg.output_dir, resolved)
    from datetime import timedelta

    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from zoft.arguments import ZOConfig

    # The processes meet here: what ZOConfig says later of how long to wait for each other would come too late.
    wait = float(cfg.trainer.get("ddp_timeout") or ZOConfig.ddp_timeout)
    PartialState(cpu=not _has_cuda(), timeout=timedelta(seconds=wait))
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


def _prepare(cfg: ZoftConfig) -> tuple[ZOTrainer, dict[str, list[Any]], PeakMemory]:
    """Everything up to the first query; nothing but the config has been written when this fails."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from zoft.interrupt import StopOnInterrupt
    from zoft.report.console import ProgressCallback
    from zoft.report.memory import PeakMemory
    from zoft.report.metrics import MetricsCallback
    from zoft.report.terminal import say
    from zoft.report.trackers import TrackerAxisCallback, forgive_trackers

    args = arguments_of(cfg)
    model, tokenizer, rows = load(cfg)
    trainer = make_trainer(cfg, args, model, tokenizer, rows)
    trainer.create_optimizer()  # binds subspace and engine: parts that do not go together are found out here
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    forgive_trackers(trainer.callback_handler.callbacks)
    memory, costs = PeakMemory(str(args.device)), _costs(cfg, trainer)
    trainer.peak_memory_mb = memory.peak_mb
    for callback in (
        MetricsCallback(lambda: trainer.journal_end),
        TrackerAxisCallback(),
        StopOnInterrupt(),
        ProgressCallback(sum(costs) / len(costs), peak_mb=memory.peak_mb),
    ):
        trainer.add_callback(callback)
    if cfg.diagnostics.every:
        from zoft.diagnostics import DiagnosticsCallback

        trainer.add_callback(DiagnosticsCallback(**vars(cfg.diagnostics)))
    if trainer.is_world_process_zero():
        for line in _opening_lines(cfg, trainer, rows):
            say(line)
    return trainer, rows, memory


def load(cfg: ZoftConfig) -> tuple[Any, Any, dict[str, list[Any]]]:
    """The model with the weights chosen that are trained, its tokenizer, and the encoded rows (train, dev, test)."""
    tokenizer, rows = load_rows(cfg)
    return load_model_of(cfg), tokenizer, rows


def load_rows(cfg: ZoftConfig) -> tuple[Any, dict[str, list[Any]]]:
    """The tokenizer and the encoded rows (train, dev, test) of a run."""
    from zoft import forms
    from zoft.data import repeats

    if cfg.task.kind != "options" and cfg.objective.name() != "auto":  # of those, the user's own rows say what they are
        forms.require_fit(cfg.task, cfg.task.kind, cfg.objective)
    splits = cfg.task.load()
    repeats.warn(splits)
    cfg.settle(forms.settled(cfg.task, splits.train, cfg.objective))
    form = forms.form_of(cfg.task, splits.train, cfg.objective)
    tokenizer = tokenizer_of(cfg)
    length, room = cfg.task.max_length, forms.room_of(cfg.task, cfg.objective)
    rows = {
        name: forms.encode_rows(form, getattr(splits, name), tokenizer, length, room)
        for name in ("train", "dev", "test")
    }
    return tokenizer, rows


def load_model_of(cfg: ZoftConfig) -> Any:
    """The model of a run, with its adapter and with the weights chosen that are trained."""
    from zoft import forms
    from zoft.models.load import load_model_as

    model = load_model_as(
        forms.model_kind(cfg.task),
        cfg.model.name,
        revision=cfg.model.revision,
        dtype=cfg.model.dtype,
        attn_implementation=cfg.model.attn_implementation,
        num_labels=forms.num_labels(cfg.task),
        seed=cfg.seed,
    )
    model = cfg.peft.wrap(model, cfg.seed)
    cfg.trainable.apply(model)
    return model


def tokenizer_of(cfg: ZoftConfig) -> Any:
    """The tokenizer of a run."""
    from zoft.models.load import load_tokenizer

    return load_tokenizer(cfg.model.name, revision=cfg.model.revision, as_mezo=_as_mezo(cfg))


def make_trainer(cfg: ZoftConfig, args: Any, model: Any, tokenizer: Any, rows: dict[str, list[Any]]) -> ZOTrainer:
    """The trainer of a run, with the parts that its config chooses."""
    from zoft import forms
    from zoft.engines.in_place import InPlace
    from zoft.trainer import ZOTrainer

    form = forms.form_of_row(rows["train"][0])
    _check_best_metric(args, METRICS[_metric_of(cfg, rows)])
    # A text takes a forward for every token: directions are made once a query, and not once in each of those.
    once = cfg.objective.generates and form in ("generate", "rated") and cfg.engine.name() == "auto"
    trainer = ZOTrainer(
        model=model,
        args=args,
        data_collator=forms.collator_for(
            form, rows["train"], tokenizer, cfg.task, cfg.objective, as_mezo=_as_mezo(cfg)
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["dev"],
        processing_class=tokenizer,
        compute_metrics=forms.metric_function(form),
        estimator=cfg.estimator,
        weighting=cfg.weighting,
        optimizer=cfg.optimizer,
        subspace=cfg.subspace,
        engine=InPlace() if once else cfg.engine,
        objective=cfg.objective,
    )
    trainer.held_out = {"test_data": rows["test"]}
    return trainer


def _metric_of(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> str:
    """What is reported of such rows: a key of :data:`METRICS`."""
    from zoft import forms

    return forms.reported(forms.form_of_row(rows["test"][0]), cfg.task)


def _as_mezo(cfg: ZoftConfig) -> bool:
    """Whether batches are MeZO's own too: with its own stream of directions, to compare number for number."""
    return cfg.estimator.noise == "torch_sequential"


def _opening_lines(cfg: ZoftConfig, trainer: ZOTrainer, rows: dict[str, list[Any]]) -> list[str]:
    """What is about to happen, for the console."""
    trained = trainer.stepper.session.weights.num_elements
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    percent = f"{100 * trained / total:.3g} %"
    costs = _costs(cfg, trainer)
    sizes = ", ".join(f"{len(data):,} {name}" for name, data in rows.items())
    q, eps = cfg.estimator.num_directions, cfg.estimator.radius
    law, directions = f" ({cfg.subspace.law})", f" (q={q}, eps={eps:g})" if eps else f" (q={q})"
    if cfg.estimator.backpropagates and not eps:
        law = directions = ""  # nothing is drawn
    return [
        f"model   {cfg.model.name}: {total:,} weights, {trained:,} trained ({percent}), {cfg.model.dtype}",
        f"task    {cfg.task.name()}: {sizes} rows",
        f"method  subspace={cfg.subspace.name()}{law}, estimator={cfg.estimator.name()}{directions}, "
        f"weighting={cfg.weighting.name()}, optimizer={cfg.optimizer.name()} "
        f"(lr={trainer.args.learning_rate:g}), engine={trainer.engine_name}",
        f"budget  {cfg.budget.queries:,} queries = {trainer.args.max_steps:,} steps of "
        + " or ".join(map(str, sorted(set(costs)))),
    ]


def _costs(cfg: ZoftConfig, trainer: ZOTrainer) -> list[int]:
    """Queries of every step of the run."""
    return [cfg.composition.queries_at(step) for step in range(trainer.args.max_steps)]


def arguments_of(cfg: ZoftConfig) -> Any:
    """The training arguments of a run."""
    from zoft.arguments import ZOConfig

    values = dict(cfg.trainer)
    values.setdefault("data_seed", cfg.seed)
    values.setdefault("dataloader_pin_memory", _has_cuda())
    if str(values.get("metric_for_best_model")).removeprefix("eval_") in METRICS["loss"]:
        values.setdefault("greater_is_better", False)
    if cfg.tracker.report_to:
        os.environ["WANDB_PROJECT"] = cfg.tracker.project
        os.environ["WANDB_MODE"] = cfg.tracker.mode
    try:
        args = ZOConfig(
            output_dir=cfg.output_dir,
            seed=cfg.seed,
            budget_queries=cfg.budget.queries,
            precision_update=cfg.precision.update,
            report_to=list(cfg.tracker.report_to),
            disable_tqdm=False,  # the bar is ours (zoft.report.console), and plain lines where there is no terminal
            **values,
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"trainer: {next(iter(str(error).splitlines()), error)}") from error
    _check_best_metric(args, {name for names in METRICS.values() for name in names})
    return args


def _check_best_metric(args: Any, computed: Collection[str]) -> None:
    """The Trainer looks the metric up at the first evaluation only."""
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in computed and (args.load_best_model_at_end or args.save_strategy == "best"):
        near = did_you_mean(metric, computed)
        raise UserError(f"trainer.metric_for_best_model={metric} is not computed by an evaluation.{near}")


def _carry_out(
    cfg: ZoftConfig, trainer: ZOTrainer, rows: dict[str, list[Any]], memory: PeakMemory, *, resuming: bool
) -> dict[str, Any]:
    from zoft.interrupt import StopOnInterrupt
    from zoft.report.plots import learning_curve
    from zoft.report.report import summary_lines, write_report
    from zoft.report.terminal import say

    first = trainer.is_world_process_zero()
    known = known_steps(cfg.output_dir) if resuming else None
    zero_shot_file = Path(cfg.output_dir) / "zero_shot.json"
    if first and resuming:
        say(f"resume  {'nothing was saved yet: starting over' if known is None else f'{known:,} steps are known'}")
    _say_if_long(trainer, rows, known or 0)
    keep_reference(trainer, rows)
    _fill_frozen_prefix(trainer, rows)
    memory.reset()
    zero_shot = _held_out(trainer, rows["test"], zero_shot_file, "zero-shot", memory)
    memory.reset()
    trainer.train(resume_from_checkpoint=None if known is None else True)
    stops = [c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnInterrupt) and c.stopped]
    if stops:
        if first:
            say(f"stopped after {trainer.state.global_step:,} steps; the same command goes on from there")
        raise Requeued if stops[0].requeue else KeyboardInterrupt
    peak = memory.peak_mb()
    final = _held_out(trainer, rows["test"], Path(cfg.output_dir) / folder.FINAL, "final", memory)
    if first:
        trainer._refuse_full_disk(Path(cfg.output_dir) / "model")
    trainer.save_model(str(Path(cfg.output_dir) / "model"))
    metric = _metric_of(cfg, rows)
    facts = _facts(cfg, trainer, len(rows["test"])) | _scores(metric, zero_shot, final)
    facts |= {
        "peak_memory_mb": peak,
        "inference_peak_mb": zero_shot["peak_memory_mb"],
    }
    if first:
        learning_curve(
            cfg.output_dir,
            title=Path(cfg.output_dir).name,
            zero_shot=zero_shot.get("perplexity", facts["zero_shot"]),
            num_eval_rows=len(rows["dev"]),
            metric="perplexity" if "perplexity" in zero_shot else metric,
        )
        write_report(cfg.output_dir, facts)
        for line in summary_lines(facts):
            say(line)
        say(f"run     {cfg.output_dir}: report.md, curve.png, metrics.csv, model/")
    return facts


def _say_if_long(trainer: ZOTrainer, rows: dict[str, list[Any]], known: int) -> None:
    """Time a few queries at the weights as they are, and say so where the rest of the run takes over an hour."""
    from zoft.report.pace import long_run_line, seconds_per_query
    from zoft.report.terminal import say

    cost = trainer.args.budget_queries / trainer.args.max_steps
    left = round((trainer.args.max_steps - known) * cost)
    if not trainer.is_world_process_zero() or left < _FEW_QUERIES:
        return
    prefix = trainer.frozen_prefix  # a query begins above it; the timed ones do not
    share = 1.0 if prefix is None else 1 - prefix.first / len(prefix.blocks)
    line = long_run_line(share * seconds_per_query(lambda: clean_query(trainer, rows["train"])), left)
    if line is not None:
        say(line)


def clean_query(trainer: ZOTrainer, rows: list[Any]) -> None:
    """The forwards of one query at the weights as they are; nothing of the run's state moves."""
    import torch

    from zoft.objectives._served import no_trials

    args = trainer.args
    trainer.model.eval()
    for number in range(args.gradient_accumulation_steps):
        chosen = rows[number * args.per_device_train_batch_size :][: args.per_device_train_batch_size] or rows[:1]
        batch = trainer._prepare_inputs(trainer.data_collator(chosen))
        with torch.no_grad(), trainer.compute_loss_context_manager(), no_trials():
            trainer.compute_loss(trainer.model, batch)


def known_steps(output_dir: str) -> int | None:
    """How many steps the folder knows, by its journal or else its newest checkpoint; None where it has neither."""
    from zoft.journal import journal, snapshot

    path = Path(output_dir) / journal.NAME
    if path.is_file():
        return journal.read(path).end
    newest = snapshot.newest(Path(output_dir))
    return None if newest is None else snapshot.step_of(newest)


def keep_reference(trainer: ZOTrainer, rows: dict[str, list[Any]]) -> None:
    """Log-probabilities of preference pairs under the model before training, once for all rows; else nothing."""
    from zoft import forms

    if forms.form_of_row(rows["train"][0]) != "pairs":
        return
    from zoft.objectives.preference import keep_reference

    trainer.model.eval()
    for part in rows.values():
        with trainer.compute_loss_context_manager():
            list(keep_reference(trainer.model, part, trainer.data_collator, trainer.args.per_device_eval_batch_size))


def _fill_frozen_prefix(trainer: ZOTrainer, rows: dict[str, list[Any]]) -> None:
    """Hidden states that never change, computed once for all rows; silent where every block is trained."""
    if trainer.frozen_prefix is None:
        return
    from tqdm import tqdm

    total = sum(map(len, rows.values()))
    label = f"hidden states below block {trainer.frozen_prefix.first}, once for the whole run"
    with tqdm(total=total, unit="row", desc=label, disable=not trainer.is_world_process_zero(), mininterval=5) as bar:
        for done in trainer.fill_frozen_prefix(*rows.values()):
            bar.update(done - bar.n)


def _held_out(trainer: ZOTrainer, rows: list[Any], kept: Path, name: str, memory: PeakMemory) -> dict[str, float]:
    """The metric on the held-out rows, computed once per run: a resumed run finds the earlier answer in its folder."""
    import json

    from zoft.report.terminal import say

    if kept.is_file() and trainer.args.world_size == 1:  # with more, all must do the same whatever disk they see
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    metrics = trainer.predict(rows, metric_key_prefix="test").metrics
    known = {f"test_{name}" for names in METRICS.values() for name in names}
    kept_keys = [key for key in metrics if key in known]
    values = {key.removeprefix("test_"): float(metrics[key]) for key in kept_keys}
    values["peak_memory_mb"] = memory.peak_mb()
    if trainer.is_world_process_zero():
        atomic.write(kept, json.dumps(values, indent=2) + "\n")
        say(f"{name:<9} held-out {_told(values)} on {len(rows):,} rows")
    return values


def _told(values: dict[str, float]) -> str:
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


def _scores(metric: str, zero_shot: dict[str, float], final: dict[str, float]) -> dict[str, Any]:
    """What was reached, as the report's facts; an accuracy's interval is computed there."""
    facts: dict[str, Any] = {"metric": metric}
    for name, values in (("zero_shot", zero_shot), ("final", final)):
        facts[name] = values[metric]
        if metric != "accuracy":
            facts[f"{name}_interval"] = (values[f"{metric}_low"], values[f"{metric}_high"])
        if metric == "loss":
            facts[f"{name}_perplexity"] = values["perplexity"]
    return facts


def _facts(cfg: ZoftConfig, trainer: ZOTrainer, num_rows: int) -> dict[str, Any]:
    """What the report says, as numbers."""
    from zoft.report.backprop import backprop_estimate_mb, model_shape
    from zoft.weights import Weights

    weights, progress = Weights(trainer.model), trainer.progress
    batch = trainer.args.per_device_train_batch_size
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    shape = model_shape(trainer.model, weights.num_elements)
    return {
        "run_name": Path(cfg.output_dir).name,
        "model": cfg.model.name,
        "task": cfg.task.name(),
        "method": cfg.method,
        "device": str(trainer.args.device),
        "dtype": cfg.model.dtype,
        "seed": cfg.seed,
        "num_eval_rows": num_rows,
        "num_queries": progress.num_queries,
        "budget_queries": cfg.budget.queries,
        "num_steps": progress.steps,
        "num_tokens": progress.num_tokens,
        "num_skipped_steps": progress.num_skipped,
        "seconds": progress.seconds,
        "seconds_forward": progress.seconds_forward,
        "seconds_other": progress.seconds - progress.seconds_forward,
        "backprop_estimate_mb": backprop_estimate_mb(shape, batch=batch, seq=longest) if shape else None,
        "num_trainable": weights.num_elements,
        "num_params": sum(p.numel() for p in trainer.model.parameters()),
        "weights_sha256": weights.digest(),
        "versions": {"zoft": __version__}
        | {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "peft", "datasets", "accelerate")
        },
        "command": shlex.join(
            ["zoft", "train", f"config={Path(cfg.output_dir) / folder.CONFIG}", f"output_dir={cfg.output_dir}-again"]
        ),
    }


def _show_finished(output_dir: str) -> dict[str, Any]:
    import json

    from zoft.report.report import summary_lines
    from zoft.report.terminal import say

    facts = dict(json.loads((Path(output_dir) / folder.REPORT).read_text(encoding="utf-8")))
    say(f"{output_dir} holds this very run, finished; choose another output_dir (or seed) to run again")
    for line in summary_lines(facts):
        say(line)
    return facts


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
