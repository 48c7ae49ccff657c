"""A run's weights at any step, rebuilt from its base model and its journal alone: no data, no forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from zoft.config.schema import ZoftConfig
    from zoft.journal.file import Contents
    from zoft.step.directions import StepDirections
    from zoft.step.update import ZOOptimizer


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
            step; a part's own file is another one now; the output folder is not empty.
    """
    from zoft.engines._optional import settle
    from zoft.journal import file as journal
    from zoft.journal import snapshot
    from zoft.run import auto
    from zoft.run.build import tokenizer_of

    path = run / journal.NAME
    contents = journal.read(path)
    steps = _steps(contents, path, to)
    if output is not None and Path(output).exists() and any(Path(output).iterdir()):
        raise UserError(f"--output {output} is not empty: give a new folder")
    settings = contents.header.get("settings", {})
    for part in (cfg.subspace, cfg.estimator, cfg.weighting, cfg.optimizer):
        for name, sha in part.own_code().items():
            if settings.get(f"code of {name}", sha) != sha:
                raise UserError(
                    f"{name} is not the file of this run, whose steps it may take otherwise: put back the one "
                    f"with the SHA-256 {settings[f'code of {name}']} (now {sha})"
                )
    auto.apply(cfg, {key: settings[key] for key in cfg.auto if key in settings})  # rates are in the records
    keeps_best = bool(cfg.trainer.get("load_best_model_at_end"))
    optimizer, directions = begin(cfg)
    checked = replay(optimizer, directions, contents, steps, path)
    session = optimizer.session
    settle(session)
    sha = session.weights.digest()
    summary = f"weights after step {steps:,} of {contents.end:,}: SHA-256 {sha}"
    summary += f"\n{checked} hashes of the journal were compared and are equal" if checked else ""
    if to is None and (why := _why_not_the_model(run, sha, keeps_best=keeps_best)):
        summary += f"\nthese are not the weights of model/: {why}"
    if output is not None:
        model: Any = session.model
        from zoft.lm.models.names import without_asking

        with snapshot.replaced(Path(output)) as folder:
            model.save_pretrained(folder, **without_asking(model))
            tokenizer_of(cfg).save_pretrained(folder)
        summary += f"\nsaved to {output}"
    return summary


def _why_not_the_model(run: Path, sha: str, *, keeps_best: bool) -> str:
    """Why the run's report tells of other weights than its journal leads to; empty where it does not."""
    from zoft.report.results import WEIGHTS, finished

    facts = finished(run)
    if facts is None or facts[WEIGHTS] == sha:
        return ""
    if keeps_best:
        step = facts.get("kept_step")
        which = f"step {step:,}: zoft replay {run} --to {step}" if step else "the run's best checkpoint"
        return f"those are of {which} (trainer.load_best_model_at_end=true)"
    return f"those are of the run as it was reported, after {facts.get('num_steps', 'other')} steps"


def replay(optimizer: ZOOptimizer, directions: StepDirections, contents: Contents, steps: int, path: Path) -> int:
    """Take a model through the first steps of a journal; how many hashes were compared on the way.

    Args:
        optimizer: of the run's method, around the base model.
        directions: of the run's steps.
        contents: what `zoft.journal.file.read` gave.
        steps: how many.
        path: the journal's file, for messages.
    """
    from zoft.engines._optional import settle
    from zoft.step.directions import replayed

    weights, checked = optimizer.session.weights, 0
    if contents.header["weights"] not in (None, weights.digest()):
        name = getattr(getattr(optimizer.session.model, "config", None), "name_or_path", "")
        raise UserError(
            f"{path} does not belong to this base model ({name}): the trained weights it began with have another hash"
        )
    for record in contents.records[:steps]:
        estimate = replayed(optimizer, directions, record, contents.observations.get(record.step))
        optimizer.progress.steps = record.step + 1
        optimizer.apply(estimate)
        known = contents.digests.get(record.step + 1)
        if known is not None:
            checked += 1
            settle(optimizer.session)
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


def begin(cfg: ZoftConfig) -> tuple[ZOOptimizer, StepDirections]:
    """The run's base model, with its method bound to it, and the directions of its steps; no data, no Trainer."""
    import transformers

    from zoft.lm.models.load import quiet
    from zoft.run.build import arguments_of, load_model_of
    from zoft.step.directions import StepDirections
    from zoft.step.update import ZOOptimizer, decay_groups
    from zoft.weights.rounding import Rounding
    from zoft.weights.tensors import Weights

    quiet()
    cfg.tracker.report_to = []
    cfg.trainer |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    args, model, method = arguments_of(cfg), load_model_of(cfg), cfg.composition
    rule, estimator, weights = method.optimizer, method.estimator, Weights(model)
    coordinates = method.bind(weights)
    session = cfg.engine.choose(estimator, coordinates, model).bind(model, coordinates, _never_queried)
    decay = args.weight_decay if rule.weight_decay is None else rule.weight_decay
    names = transformers.Trainer.get_decay_parameter_names(None, model)  # the rule reads nothing but the model
    rounding = Rounding.chosen(args.precision_update, args.seed, estimator.noise)
    optimizer = ZOOptimizer(decay_groups(weights, names, decay), rule, session, args.learning_rate, rounding)
    return optimizer, StepDirections(estimator, args.seed)


def _never_queried(batch: Any) -> Tensor:
    raise AssertionError("a replay queries nothing")
