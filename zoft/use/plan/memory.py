"""Memory of a run by its parts, from shapes alone: this method beside LoRA and full AdamW on the same model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from zoft.config.schema import ZoftConfig
from zoft.engines._elsewhere import Elsewhere
from zoft.lm.models.quantized import stored_parts
from zoft.report.backprop import backprop_parts_mb, model_shape
from zoft.subspaces.base import num_moving
from zoft.weights.tensors import Weights

log = logging.getLogger(__name__)
MB = 2**20
CHUNK_MB = 16.0
"""What is drawn and written at a time: a chunk of noise, the step and the weights it is added to."""

LORA_RANK, LORA_MATRICES = 8, 2
"""The LoRA that is compared with: rank 8 on queries and values, as in MeZO (Malladi et al. 2023)."""


@dataclass(frozen=True)
class Size:
    """How much goes through the model at a time.

    Args:
        batch: rows of a training forward, every option of a row counted.
        eval_batch: rows of an evaluation's forward, likewise.
        longest: tokens of the longest row.
        positions: positions of a row whose logits are computed.
        kept_tokens: tokens whose hidden states below the lowest trained block are kept.
    """

    batch: int
    eval_batch: int
    longest: int
    positions: int
    kept_tokens: int = 0


@dataclass(frozen=True)
class Memory:
    """An estimate.

    Args:
        parts: MiB of each part.
        host_mb: of the interpreter and its libraries, where the model is on the host too; else 0.
    """

    parts: dict[str, float] = field(default_factory=dict)
    host_mb: float = 0.0

    @property
    def total_mb(self) -> float:
        """All of it, as a process would show it."""
        return sum(self.parts.values()) + self.host_mb


def of_method(cfg: ZoftConfig, model: Any, size: Size, host_mb: float = 0.0) -> Memory:
    """Memory of this config's run.

    Weights are there once, and not here where a server has them. A query adds the hidden states of its forward, one
    block's at a time, and the logits that are computed; an optimizer its float32 state in the coordinates of the
    subspace, or a window of batches; layerwise perturbation one copy of the largest matrix that it perturbs; 16-bit
    weights the float32 masters of small tensors.

    Args:
        cfg: the run's.
        model: on the meta device, with its adapter and what is trained chosen.
        size: what goes through it at a time.
        host_mb: of the interpreter and its libraries.
    """
    weights = Weights(model, shapes_only=True)
    engine: Any = cfg.engine
    served = isinstance(engine, Elsewhere) and engine.holds_base
    here = list(weights.tensors.values()) if served else _unique(model)
    parts = {
        "weights": sum(t.numel() * t.element_size() for t in here) / MB + (engine.base_mb() if served else 0.0),
        "optimizer state": _state_mb(cfg, weights),
        "window of batches": _window_mb(cfg, weights, size),
        "forward": 0.0 if served else _forward_mb(model, size),
        "a perturbed copy": _copy_mb(cfg, model, weights),
        "kept hidden states": _kept_mb(cfg, model, size),
        "chunks of noise": CHUNK_MB,
    }
    return Memory({name: mb for name, mb in parts.items() if mb >= 0.05}, host_mb)


def num_moving_of(cfg: ZoftConfig, model: Any) -> int:
    """How many numbers this config's run moves of a model on the meta device."""
    weights = Weights(model, shapes_only=True)
    try:
        return num_moving(cfg.composition.bind(weights))
    except Exception:  # a subspace that looks at the numbers themselves
        return weights.num_elements


def of_backprop(model: Any, size: Size, host_mb: float = 0.0, *, lora: bool) -> Memory:
    """Memory of backpropagation with AdamW on the same model, of all weights or of a LoRA.

    Args:
        model: on the meta device, without an adapter.
        size: what goes through it at a time.
        host_mb: of the interpreter and its libraries.
        lora: whether only an adapter of :data:`LORA_RANK` is trained.
    """
    shape = model_shape(model)
    if shape is None:
        return Memory({}, host_mb)
    if lora:
        shape.num_trainable = 2 * LORA_RANK * shape.hidden * LORA_MATRICES * shape.num_layers
    return Memory(backprop_parts_mb(shape, batch=size.batch, seq=size.longest), host_mb)


def _unique(model: Any) -> list[Any]:
    """Every parameter and buffer once, and scales beside their codes; tied ones are one."""
    return [*(part for parameter in model.parameters() for part in stored_parts(parameter)), *model.buffers()]


def _forward_mb(model: Any, size: Size) -> float:
    """Hidden states of a block while no gradient is kept, and the logits that are computed, for two points at once."""
    text = model.config.get_text_config()
    hidden = getattr(text, "hidden_size", 0)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    width = max(4 * inner, 6 * hidden) + 2 * hidden
    rows = max(size.batch, size.eval_batch)
    states = rows * size.longest * width * next(model.parameters()).element_size()
    logits = rows * size.positions * (getattr(text, "vocab_size", 0) or 0) * 4 * 2  # and their log-probabilities
    return (2 * states + logits) / MB


def _copy_mb(cfg: ZoftConfig, model: Any, weights: Weights) -> float:
    """What a query holds of weights beside the model's own: the largest matrix, or all that are put back afterwards."""
    sizes = [t.numel() * t.element_size() for t in weights.tensors.values()]
    engine: Any = cfg.engine
    try:
        engine = engine.choose(cfg.estimator, cfg.composition.bind(weights), model)
    except Exception:  # a subspace that looks at the numbers themselves
        log.debug("the engine is not known before the weights are", exc_info=True)
    subtracts = getattr(engine, "restore", "") == "subtract" or cfg.estimator.noise == "torch_sequential"
    is_copied = engine.name() == "in_place" and not subtracts
    return (sum(sizes) if is_copied else max(sizes, default=0)) / MB


def _state_mb(cfg: ZoftConfig, weights: Weights) -> float:
    """Float32 state of the optimizer over the coordinates that move, and masters of small 16-bit tensors."""
    rule, method = cfg.optimizer, cfg.composition
    if cfg.estimator.backpropagates:
        return float(8 * weights.num_elements) / MB
    try:
        shapes = [method.bind(weights).shape(name) for name in weights.tensors]
    except Exception:  # a subspace that looks at the numbers themselves: every coordinate, at the most
        shapes = [tuple(tensor.shape) for tensor in weights.tensors.values()]
    counts = [_count(state_shape) for shape in shapes for state_shape in rule.state_shapes(shape).values()]
    masters = [t.numel() for t in weights.tensors.values() if t.element_size() < 4 and t.ndim < 2]
    return 4 * (sum(counts) + sum(masters)) / MB


def _window_mb(cfg: ZoftConfig, weights: Weights, size: Size) -> float:
    """Inputs and node gradients that the rule keeps of the last batches, at the longest row's positions."""
    window = getattr(cfg.optimizer, "window", 0)
    if not window:
        return 0.0
    bound = cfg.composition.bind(weights)
    shapes = [t.shape for name, t in weights.tensors.items() if t.ndim == 2 and bound.ever_moves(name)]
    return 4 * window * size.batch * size.positions * sum(map(sum, shapes)) / MB


def _kept_mb(cfg: ZoftConfig, model: Any, size: Size) -> float:
    """Hidden states below the lowest trained block, float32 as the model is, up to their bound."""
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0)
    bound = float(cfg.trainer.get("frozen_prefix_mb", 2048))
    return min(bound, size.kept_tokens * hidden * next(model.parameters()).element_size() / MB)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
