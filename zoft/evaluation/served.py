"""A model whose forwards run in another runtime, for an evaluation: the adapter here, its base there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.errors import UserError


def served_model(cfg: ZoftConfig, run: str, tokenizer: Any) -> Any | None:
    """The config's model or a run's final one, answered for by another runtime, which has its base; else None.

    Args:
        cfg: model, adapter and engine.
        run: a run's folder, or the empty string for an adapter as it is before training.
        tokenizer: the model's.

    Raises:
        UserError: nothing answers, or the run trained no adapter.
    """
    from zoft.engines._elsewhere import Elsewhere
    from zoft.run.build import model_held_elsewhere
    from zoft.subspaces.full import Full
    from zoft.weights.tensors import Weights

    engine: Any = cfg.engine
    if not (isinstance(engine, Elsewhere) and engine.holds_base):
        return None
    engine.prepare()
    model: Any = model_held_elsewhere(cfg, tokenizer)
    weights = Weights(model)
    coordinates = Full().bind(weights, "counter")
    engine.choose(cfg.estimator, coordinates, model)
    if run:
        _load(weights, Path(run) / "model", engine.name())
    engine.bind(model, coordinates, lambda batch: batch)  # the model knows from now on who answers
    return model


def _load(weights: Any, folder: Path, engine: str) -> None:
    """An adapter's numbers from its folder."""
    from safetensors.torch import load_file

    from zoft.engines._elsewhere import saved_name

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"engine={engine} computes with adapters on a base of its own, and {folder} holds a whole model: use "
            "engine=auto, which loads it"
        )
    saved = load_file(file)
    names = {name: saved_name(name) for name in weights.tensors}
    if saved.keys() != set(names.values()):
        raise UserError(f"{file} is the adapter of another config: give the run's own, without peft= and trainable=")
    for name, tensor in weights.tensors.items():
        tensor.data.copy_(saved[names[name]])
