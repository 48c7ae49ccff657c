"""Settings of a run that its other parts leave without effect: refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from zoft.engines._elsewhere import Elsewhere
from zoft.errors import refuse_ignored
from zoft.lm.data.files import ASSET
from zoft.optimizers.whiten import unread_bound
from zoft.subspaces.nodes import OF_AN_ADAPTER
from zoft.trainer.values import unread_forwards
from zoft.utils.files import at_home


def refuse_without_effect(cfg: Any) -> None:
    """Refuse the first setting that does nothing in this run.

    Args:
        cfg: a :class:`zoft.config.schema.ZoftConfig`.
    """
    for sentence in (*_of_model(cfg), *_of_tracker(cfg), *_of_method(cfg)):
        refuse_ignored(sentence)


def refuse_steps(trainer: Mapping[str, Any], given: Collection[str]) -> None:
    """Refuse steps between evaluations or checkpoints where there are none; an argument may put a file's to rest."""
    for kind, usual, nothing in (("eval", 500, "evaluates at no step"), ("save", None, "saves no checkpoint")):
        steps, strategy = trainer.get(f"{kind}_steps", usual), f"trainer.{kind}_strategy"
        put_to_rest = strategy in given and f"trainer.{kind}_steps" not in given
        if trainer.get(f"{kind}_strategy") == "no" and steps != usual and not put_to_rest:
            refuse_ignored(
                f"trainer.{kind}_steps={steps} does nothing: {strategy}=no {nothing}: leave it out, or set "
                f"{strategy}=steps"
            )


def _of_model(cfg: Any) -> Iterator[str]:
    model, update = cfg.model, cfg.precision.update
    if model.revision is not None and (model.name.startswith(ASSET) or at_home(model.name).is_dir()):
        what = "an asset of one version" if model.name.startswith(ASSET) else "a folder, which has no revisions"
        yield f"model.revision={model.revision} does nothing: model.name={model.name} is {what}: leave it out"
    if model.dtype == "float32" and update != "auto":
        yield (
            f"precision.update={update} does nothing: model.dtype=float32 takes steps as they are: leave it out, or "
            "set model.dtype=bfloat16"
        )


def _of_tracker(cfg: Any) -> Iterator[str]:
    tracker = cfg.tracker
    for name, usual, of in (("project", "zoft", ("wandb", "trackio", "mlflow")), ("mode", "online", ("wandb",))):
        value = getattr(tracker, name)
        if value != usual and not set(of) & set(tracker.report_to):
            chosen = ", ".join(tracker.report_to)
            yield (
                f"tracker.{name}={value} does nothing: of {', '.join(of)}, which read it, tracker.report_to=[{chosen}] "
                "has none: leave it out, or set tracker.report_to=[wandb]"
            )


def _of_method(cfg: Any) -> Iterator[str]:
    engine, trainer = cfg.engine, cfg.trainer
    if cfg.estimator.name() == "backprop" and engine.name() != "auto":
        yield (
            f"engine={engine.name()} does nothing: it evaluates losses at points, and estimator=backprop asks for "
            "none: leave it out (engine=auto)"
        )
    layers = getattr(cfg.subspace, "layers", "auto")
    if layers != "auto" and cfg.peft.name() == "lora" and cfg.trainable.name() in ("auto", "adapter"):
        yield OF_AN_ADAPTER.format(layers)
    yield from filter(None, [unread_bound(cfg)])
    if isinstance(engine, Elsewhere):
        yield from unread_forwards(trainer, f"forwards of engine={engine.name()} run elsewhere", "trainer.")
    if cfg.protocol == "mezo":
        for name, usual in (("data_seed", cfg.seed), ("train_sampling_strategy", "random")):
            if trainer.get(name, usual) != usual:
                yield (
                    f"trainer.{name}={trainer[name]} does nothing: protocol=mezo has rows in the order of MeZO's own "
                    "code, by seed: leave it out"
                )
