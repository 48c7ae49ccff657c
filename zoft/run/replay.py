"""A run's weights at any step, rebuilt from its base model and its journal alone: no data, no forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zoft.errors import UserError
from zoft.estimators._anchor import anchor_batches

if TYPE_CHECKING:
    from zoft.config.schema import ZoftConfig
    from zoft.journal.file import Contents
    from zoft.trainer.trainer import ZOTrainer


def replay_run(cfg: ZoftConfig, run: Path, to: str | None = None, output: str | None = None) -> str:
    """Replay a run of `zoft train`.

    Args:
        cfg: the run's own config.
        run: its folder, or another one with its journal.
        to: number of steps, as text; None takes all there are.
        output: folder to save the model or adapter to; None saves nothing.

    Returns:
        What was rebuilt, for the console.

    Raises:
        UserError: the journal does not belong to this base model, does not begin at its first step, or has no such
            step; the output folder is not empty.
    """
    from zoft.journal import file as journal

    path = run / journal.NAME
    contents = journal.read(path)
    steps = _steps(contents, path, to)
    if output is not None and Path(output).exists() and any(Path(output).iterdir()):
        raise UserError(f"--output {output} is not empty: give a new folder")
    trainer = _trainer_of(cfg)
    checked = replay(trainer, contents, steps, path)
    from zoft.weights.tensors import Weights

    sha = Weights(trainer.model).digest()
    told = f"weights after step {steps:,} of {contents.end:,}: SHA-256 {sha}"
    told += f"\n{checked} hashes of the journal were compared and are equal" if checked else ""
    if to is None and (why := _why_not_the_model(cfg, run, sha)):
        told += f"\nthese are not the weights of model/: {why}"
    if output is not None:
        from zoft.run.train import save_model

        save_model(trainer, Path(output))
        told += f"\nsaved to {output}"
    return told


def _why_not_the_model(cfg: ZoftConfig, run: Path, sha: str) -> str:
    """Why the run's report tells of other weights than its journal leads to; empty where it does not."""
    from zoft.report.results import WEIGHTS, finished

    facts = finished(run)
    if facts is None or facts[WEIGHTS] == sha:
        return ""
    if cfg.trainer.get("load_best_model_at_end"):
        return "those are of the run's best checkpoint (trainer.load_best_model_at_end=true)"
    return f"those are of the run as it was reported, after {facts.get('num_steps', 'other')} steps"


def replay(trainer: ZOTrainer, contents: Contents, steps: int, path: Path) -> int:
    """Take a fresh trainer's model through the first steps of a journal; how many hashes were compared on the way.

    Args:
        trainer: with the base model, and the method of the run.
        contents: what `zoft.journal.file.read` gave.
        steps: how many.
        path: the journal's file, for messages.
    """
    from zoft.step import replay as step_replay
    from zoft.step.estimate import StepEstimate
    from zoft.weights.tensors import Weights

    weights = Weights(trainer.model)
    if contents.header["weights"] not in (None, weights.digest()):
        raise UserError(
            f"{path} does not belong to this base model ({trainer.model.config.name_or_path}): the trained weights it "
            "began with have another hash"
        )
    trainer.create_optimizer()
    stepper, checked = trainer.stepper, 0
    for record in contents.records[:steps]:
        for group in stepper.param_groups:
            group["lr"] = record.lr
        estimate = StepEstimate.from_record(
            record,
            trainer.directions.at(record.step),
            contents.looks.get(record.step),
            keeps_anchor=bool(anchor_batches(trainer.method.estimator, record.step)),
        )
        step_replay.begin(stepper, estimate, trainer.method.estimator)
        stepper.progress.steps = record.step + 1
        stepper.apply(estimate)
        known = contents.digests.get(record.step + 1)
        if known is not None:
            checked += 1
            if known != weights.digest():
                raise UserError(
                    f"the weights after step {record.step + 1} are not those of the run: another device or version of "
                    "torch computes other last bits (docs/journal.md says for which subspaces)"
                )
    return checked


def _steps(contents: Contents, path: Path, to: str | None) -> int:
    if contents.header["first"]:
        raise UserError(
            f"{path} begins at step {contents.header['first']}: what was before it is in a checkpoint, and cannot be "
            "replayed from the base model"
        )
    if to is None:
        return contents.end
    if not to.isdecimal() or int(to) > contents.end:
        raise UserError(f"--to {to}: give a number of steps from 0 to {contents.end}")
    return int(to)


def _trainer_of(cfg: ZoftConfig) -> ZOTrainer:
    """A trainer with the run's base model and method, without data."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from zoft.run.build import arguments_of, load_model_of, tokenizer_of
    from zoft.trainer.trainer import ZOTrainer

    cfg.tracker.report_to = []
    for key in ("eval_strategy", "save_strategy"):
        cfg.trainer[key] = "no"
    cfg.trainer["load_best_model_at_end"] = False
    return ZOTrainer(
        model=load_model_of(cfg),
        args=arguments_of(cfg),
        processing_class=tokenizer_of(cfg),
        estimator=cfg.estimator,
        weighting=cfg.weighting,
        optimizer=cfg.optimizer,
        subspace=cfg.subspace,
        engine=cfg.engine,
        objective=cfg.objective,
    )
