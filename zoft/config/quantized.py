"""Refusals of parts that a base of few bits cannot be combined with, before anything is loaded."""

from __future__ import annotations

from typing import Any

from zoft.errors import UserError
from zoft.lm.models.quantized import require_package


def check_quantization(cfg: Any) -> None:
    """Refuse what a base of few bits cannot do.

    Args:
        cfg: of a run (a ``ZoftConfig``, which asks here).

    Raises:
        UserError: a package that is not installed, weights that cannot take a step, or parts that need plain weights.
    """
    quantization, scales = cfg.model.quantization, cfg.trainable.name() == "scales"
    if quantization is not None:
        _check_base(cfg, quantization, scales=scales)
    if scales:
        _check_scales(cfg)


def _check_base(cfg: Any, quantization: str, *, scales: bool) -> None:
    require_package(quantization)
    adapter = cfg.peft.name() != "none" and cfg.trainable.name() in ("adapter", "auto")
    if not (scales or adapter):
        raise UserError(
            f"model.quantization={quantization} leaves the base's weights in few bits, and a step is too small for "
            "them: train an adapter on top (peft=lora trainable=adapter; prefix and prompt too), or the scales "
            "(trainable=scales)"
        )
    if adapter and cfg.subspace.name() == "vectors":
        raise UserError(
            f"subspace=vectors moves normalisation weights and biases, and on a quantised base (model.quantization="
            f"{quantization}) the adapter alone is trained, which has none: use subspace=full"
        )
    if adapter and cfg.engine.name() == "side_path" and quantization != "nf4":
        raise UserError(
            f"engine=side_path multiplies the rows of several points at once, and model.quantization={quantization} "
            "rounds them together (bitsandbytes) or cannot (torchao): use engine=auto, or model.quantization=nf4"
        )
    estimator = cfg.estimator
    if quantization == "int8" and any(point.derivative for point in estimator.points(estimator.directions(0, 0))):
        raise UserError(
            f"estimator={estimator.name()} needs exact derivatives, which bitsandbytes' 8-bit layers do not have: use "
            "estimator=central, or model.quantization=nf4"
        )
    if cfg.engine.name() == "offload":
        raise UserError(
            f"engine=offload moves plain tensors, and model.quantization={quantization} has none: leave one of them out"
        )


def _check_scales(cfg: Any) -> None:
    """They are saved in the base, and move by steps that have to survive."""
    if cfg.peft.name() != "none":
        raise UserError(
            f"trainable=scales trains the quantised base and saves it, and peft={cfg.peft.name()} puts an adapter on "
            "top: use peft=none, or trainable=adapter"
        )
    cfg.composition.check_scales()
    if cfg.model.quantization == "int8_torchao" and cfg.model.dtype != "float32":
        raise UserError(
            "trainable=scales with model.quantization=int8_torchao needs model.dtype=float32: torchao rounds scales to "
            f"{cfg.model.dtype} while it computes, and a step would be lost (not so with model.quantization=int8)"
        )
