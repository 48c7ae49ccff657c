"""From a config to objects: rows, model, tokenizer, arguments, trainer."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError, did_you_mean, refuse_ignored
from zoft.lm.data.lengths import UNCUT, cut_of
from zoft.lm.objectives._written import WrittenObjective

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.lm.models.trainable.base import Trainable
    from zoft.lm.tasks.base import Splits
    from zoft.trainer.trainer import ZOTrainer


log = logging.getLogger("zoft.run.build")
METRICS = {
    "accuracy": ("loss", "accuracy", "accuracy_low", "accuracy_high"),
    "loss": ("loss", "loss_low", "loss_high", "perplexity"),
    "f1": ("loss", "f1", "f1_low", "f1_high", "exact_match", "exact_match_low", "exact_match_high"),
    "exact_match": ("loss", "exact_match", "exact_match_low", "exact_match_high", "f1", "f1_low", "f1_high"),
    "reward": ("loss", "reward", "reward_low", "reward_high"),
}
"""What is reported -> all that an evaluation computes then."""


def load(cfg: ZoftConfig) -> tuple[Any, Any, dict[str, list[Any]]]:
    """The model of a run, its tokenizer, and the encoded rows (train, dev, test)."""
    tokenizer, rows = load_rows(cfg)
    return load_fitting(cfg, tokenizer, rows), tokenizer, rows


def load_fitting(cfg: ZoftConfig, tokenizer: Any, rows: dict[str, list[Any]], base: Any = None) -> Any:
    """The model with the weights chosen that are trained, which has to know the rows' tokens."""
    from zoft.lm.models.agreement import require_rows_fit

    model = model_to_train(cfg, tokenizer) if base is None else _ready_to_train(cfg, base)
    require_rows_fit(model, (row for part in rows.values() for row in part), tokenizer, cfg.model.name)
    return model


def require_trackers(cfg: ZoftConfig) -> None:
    """Refuse a tracker, or a kernel, whose package is not there.

    Raises:
        UserError: saying what to install.
    """
    for tracker in cfg.tracker.report_to:
        packages = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(
                f"tracker={tracker} needs a package that is not there: pip install {packages[0]}, or leave it out "
                "(metrics.csv and metrics.jsonl in the run's folder are always written)"
            )
    if cfg.trainer.get("use_liger_kernel") and not importlib.util.find_spec("liger_kernel"):
        raise UserError(
            "trainer.use_liger_kernel=true needs a package that is not there: pip install liger-kernel, or leave it out"
        )


def require_fit(cfg: ZoftConfig) -> None:
    """Refuse an objective that does not go with the task, where that is known before its rows are read.

    Raises:
        UserError: saying which objectives do.
    """
    from zoft.lm import formats

    if cfg.task.kind != "options" and cfg.objective.name() != "auto":  # of those, the user's own rows say what they are
        formats.require_fit(cfg.task, cfg.task.kind, cfg.objective)


def load_rows(cfg: ZoftConfig, splits: Splits | None = None) -> tuple[Any, dict[str, list[Any]]]:
    """The tokenizer and the encoded rows (train, dev, test) of a run.

    Args:
        cfg: the run's.
        splits: its rows, where they have been read already.
    """
    from zoft.lm import formats
    from zoft.lm.data import repeats

    require_fit(cfg)
    splits = cfg.task.load() if splits is None else splits
    repeats.warn(splits)
    cfg.settle(formats.settled(cfg.task, splits.train, cfg.objective))
    form = formats.format_of(cfg.task, splits.train, cfg.objective)
    _refuse_unread(cfg, is_written=form in ("generate", "rated"))
    tokenizer = tokenizer_of(cfg)
    length, room = row_limit(cfg, tokenizer), formats.room_of(cfg.task, cfg.objective)
    encode = functools.partial(
        formats.encode_rows, form, tokenizer=tokenizer, room=room, as_mezo=cfg.protocol == "mezo"
    )
    rows = {name: encode(getattr(splits, name), max_length=length) for name in ("train", "dev", "test")}
    for name in ("train", "test"):
        say_cut(rows[name], length, name, functools.partial(encode, getattr(splits, name), max_length=UNCUT))
    return tokenizer, rows


def _refuse_unread(cfg: ZoftConfig, *, is_written: bool) -> None:
    """Refuse settings of how texts are written where none is, and of forwards over whole rows where texts are."""
    from zoft.trainer.values import unread_forwards

    objective, unread = cfg.objective, list[str]()
    if isinstance(objective, WrittenObjective) and not is_written:
        why = f"task={cfg.task.name()} has answers to choose from, and nothing is written: leave it out"
        unread = [f"objective.{name}={getattr(objective, name)} does nothing: {why}" for name in objective.of_writing()]
    names = ("frozen_prefix_mb", *(("narrow_last_block",) if is_written else ()))
    if objective.generates:
        why = f"what objective={objective.name()} writes is computed token by token"
        unread += unread_forwards(cfg.trainer, why, "trainer.", names)
    for sentence in unread:
        refuse_ignored(sentence)


def row_limit(cfg: ZoftConfig, tokenizer: Any) -> int:
    """Tokens that are kept of a row: ``task.max_length``, or where that is 0 all that the model takes."""
    from zoft.lm.models.load import tokens_taken

    return cfg.task.max_length or tokens_taken(cfg.model.name, cfg.model.revision, tokenizer) or UNCUT


def say_cut(rows: list[Any], limit: int, name: str, whole: Callable[[], list[Any]]) -> None:
    """A note where rows were longer than what is kept of them."""
    cut = cut_of(rows, limit, whole)
    if cut is not None and cut.num_cut:
        log.warning(
            "%s of %s %s rows are cut at %d tokens (task.max_length); the longest has %s",
            *(f"{cut.num_cut:,}", f"{cut.num_rows:,}", name, limit, f"{cut.longest:,}"),
        )


def model_to_train(cfg: ZoftConfig, tokenizer: Any) -> Any:
    """The model of a run; where a server has its base, the adapter on shapes alone."""
    return model_held_elsewhere(cfg, tokenizer) or load_model_of(cfg, tokenizer)


def load_model_of(cfg: ZoftConfig, tokenizer: Any = None) -> Any:
    """The model of a run, with its adapter and with the weights chosen that are trained."""
    return _ready_to_train(cfg, load_base(cfg, cfg.model.name, cfg.model.revision, tokenizer or tokenizer_of(cfg)))


def load_base(cfg: ZoftConfig, name: str, revision: str | None, tokenizer: Any) -> Any:
    """A model of this name with the config's head, dtype, quantisation and place; no adapter."""
    from zoft.lm import formats
    from zoft.lm.models.load import load_model_as

    return load_model_as(
        formats.model_kind(cfg.task),
        name,
        revision=revision,
        dtype=cfg.model.dtype,
        attn_implementation=cfg.model.attn_implementation,
        quantization=cfg.model.quantization,
        device_map=cfg.model.device_map,
        num_labels=formats.num_labels(cfg.task),
        labels=formats.class_names(cfg.task),
        seed=cfg.seed,
        tokenizer=tokenizer,
    )


def _ready_to_train(cfg: ZoftConfig, model: Any) -> Any:
    """The model with its adapter, and with the weights chosen that are trained."""
    from zoft.lm.models.quantized import require_adapter

    model = cfg.peft.wrap(model, cfg.seed, cfg.model.revision)
    if cfg.trainable.name() != "scales":
        require_adapter(model, cfg.model.name)
    trainable_of(cfg).apply(model)
    return model


def model_held_elsewhere(cfg: ZoftConfig, tokenizer: Any) -> Any | None:
    """The adapter in memory on a base of shapes alone where another runtime has the base, else None."""
    from zoft.engines._elsewhere import Elsewhere

    if not (isinstance(cfg.engine, Elsewhere) and cfg.engine.holds_base):
        return None
    from zoft.journal.fingerprint import know_base
    from zoft.lm import formats
    from zoft.lm.models.agreement import agree
    from zoft.lm.models.meta import meta_model, wrapped_on_meta

    model = meta_model(
        formats.model_kind(cfg.task),
        cfg.model.name,
        revision=cfg.model.revision,
        dtype="float32",
        attention=None,
        num_labels=formats.num_labels(cfg.task),
    )
    agree(model, tokenizer, cfg.model.name)
    model = wrapped_on_meta(model, lambda base: cfg.peft.wrap(base, cfg.seed, cfg.model.revision))
    trainable_of(cfg).apply(model)
    know_base(model, f"served:{cfg.engine.served_name()}")
    return model


def trainable_of(cfg: ZoftConfig) -> Trainable:
    """What is trained; ``auto`` is the last block where layers' outputs move: there it pays most (docs/nodes.md)."""
    from zoft.lm.models.trainable.last_blocks import LastBlocks

    is_chosen = cfg.trainable.name() != "auto" or cfg.peft.name() != "none" or not cfg.subspace.moves_outputs
    return cfg.trainable if is_chosen else LastBlocks(num_blocks=1)


def tokenizer_of(cfg: ZoftConfig, run: str = "") -> Any:
    """The tokenizer of a run.

    Args:
        cfg: its config.
        run: its folder, if it is a finished one: the tokenizer lies beside the model.
    """
    from zoft.lm import formats
    from zoft.lm.models.load import load_tokenizer

    saved = Path(run) / "model"
    side = "left" if formats.model_kind(cfg.task) == "causal" else "right"
    if run and (saved / "tokenizer_config.json").is_file():
        return load_tokenizer(str(saved.absolute()), padding_side=side)
    return load_tokenizer(cfg.model.name, revision=cfg.model.revision, as_mezo=_as_mezo(cfg), padding_side=side)


def make_trainer(cfg: ZoftConfig, args: Any, model: Any, tokenizer: Any, rows: dict[str, list[Any]]) -> ZOTrainer:
    """The trainer of a run, with the parts that its config chooses."""
    from zoft.engines.in_place import InPlace
    from zoft.lm import formats
    from zoft.trainer.mezo import step_seeds
    from zoft.trainer.trainer import ZOTrainer

    mezo = cfg.protocol == "mezo"
    form = formats.format_of_row(rows["train"][0])
    _check_best_metric(args, METRICS[metric_of(cfg, rows)])
    # A text takes a forward for every token: directions are made once a query, and not once in each of those.
    writes = cfg.objective.generates and form in ("generate", "rated") and not cfg.subspace.moves_outputs
    once = writes and cfg.engine.name() == "auto"
    trainer = ZOTrainer(
        model=model,
        args=args,
        data_collator=formats.collator_for(
            form, rows["train"], tokenizer, cfg.task, cfg.objective, as_mezo=_as_mezo(cfg)
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["dev"],
        processing_class=tokenizer,
        compute_metrics=formats.metric_function(form),
        estimator=cfg.estimator,
        weighting=cfg.weighting,
        optimizer=cfg.optimizer,
        subspace=cfg.subspace,
        engine=InPlace() if once else cfg.engine,
        objective=cfg.objective,
        direction_seeds=step_seeds(cfg.seed, max(args.max_steps, cfg.budget.queries)) if mezo else None,
        mezo_protocol=mezo,
    )
    trainer.held_out = {"test_data": rows["test"]}
    return trainer


def metric_of(cfg: ZoftConfig, rows: dict[str, list[Any]]) -> str:
    """What is reported of such rows: a key of :data:`METRICS`."""
    from zoft.lm import formats

    return formats.reported(formats.format_of_row(rows["test"][0]), cfg.task)


def _as_mezo(cfg: ZoftConfig) -> bool:
    """Whether batches are MeZO's own too: with its own stream of directions, to compare number for number."""
    return cfg.estimator.noise == "torch_sequential"


def arguments_of(cfg: ZoftConfig) -> Any:
    """The training arguments of a run."""
    from zoft.trainer.config import ZOConfig

    values = dict(cfg.trainer)
    values.setdefault("data_seed", cfg.seed)
    values.setdefault("dataloader_pin_memory", _has_cuda())
    if str(values.get("metric_for_best_model")).removeprefix("eval_") in METRICS["loss"]:
        values.setdefault("greater_is_better", False)
    _check_best_checkpoint(cfg, values)
    if cfg.tracker.report_to:
        from zoft.report.trackers import set_variable

        require_trackers(cfg)
        os.environ["WANDB_PROJECT"] = cfg.tracker.project
        os.environ["WANDB_MODE"] = cfg.tracker.mode
        set_variable("MLFLOW_EXPERIMENT_NAME", cfg.tracker.project, cfg.tracker.project != type(cfg.tracker).project)
    try:
        args = ZOConfig(
            output_dir=cfg.output_dir,
            seed=cfg.seed,
            budget_queries=cfg.budget.queries,
            precision_update=cfg.precision.update,
            report_to=list(cfg.tracker.report_to),
            project=cfg.tracker.project,
            disable_tqdm=False,  # the bar is ours (zoft.report.console), and plain lines where there is no terminal
            **values,
        )
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    _check_best_metric(args, {name for names in METRICS.values() for name in names})
    return args


def _check_best_checkpoint(cfg: ZoftConfig, values: Mapping[str, Any]) -> None:
    """The best checkpoint is the best, and one that was saved when it was evaluated."""
    save, judge = (str(values.get(f"{verb}_strategy", "no")) for verb in ("save", "eval"))
    up, metric = values.get("greater_is_better"), str(values.get("metric_for_best_model") or "loss")
    metric = metric.removeprefix("eval_")
    if up is not None and any(metric in one for one in METRICS.values()) and bool(up) == (metric in METRICS["loss"]):
        raise UserError(
            f"trainer.greater_is_better={str(up).lower()} would keep the worst {metric} for the best: leave it out, or "
            "name another trainer.metric_for_best_model"
        )
    delay = values.get("eval_delay") or 0
    if values.get("load_best_model_at_end") and delay > (last := cfg.composition.steps_within(cfg.budget.queries)):
        raise UserError(
            f"trainer.eval_delay={delay} is longer than the run of {last} steps: trainer.load_best_model_at_end=true "
            "has nothing to choose from: lower it, or set trainer.load_best_model_at_end=false"
        )
    if values.get("load_best_model_at_end") and save not in ("best", judge):
        raise UserError(
            f"trainer.load_best_model_at_end=true goes back to a checkpoint, and trainer.save_strategy={save} with "
            f"trainer.eval_strategy={judge} does not save one at each evaluation: set "
            "trainer.load_best_model_at_end=false, or give both strategies the same value"
        )


def _check_best_metric(args: Any, computed: Collection[str]) -> None:
    """The Trainer looks the metric up at the first evaluation only."""
    metric = str(args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in computed and (args.load_best_model_at_end or args.save_strategy == "best"):
        near = did_you_mean(metric, computed)
        raise UserError(f"trainer.metric_for_best_model={metric} is not computed by an evaluation.{near}")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
