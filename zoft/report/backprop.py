"""The memory that backpropagation with AdamW would take: an analytic estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MB = 2**20


@dataclass
class ModelShape:
    """The numbers of a transformer from which its training memory follows.

    Args:
        num_params: all weights.
        num_trainable: those that backpropagation would train.
        num_layers: transformer blocks (of encoder and decoder together).
        hidden: width h of the residual stream.
        num_heads: attention heads a.
        vocab: width v of the logits; 0 for a model that predicts no tokens.
        weight_bytes: of one weight: 4 for float32, 2 for bfloat16 and float16.
        eager_attention: whether the attention probabilities are stored. Fused attention (`sdpa`, flash) does not.
    """

    num_params: int
    num_trainable: int
    num_layers: int
    hidden: int
    num_heads: int
    vocab: int
    weight_bytes: int = 4
    eager_attention: bool = True


def backprop_parts_mb(shape: ModelShape, *, batch: int, seq: int) -> dict[str, float]:
    """What full backpropagation with AdamW keeps in memory at its peak, part by part: an analytic estimate.

    * weights: `weight_bytes` each;
    * gradients: `weight_bytes` for each trainable weight;
    * optimizer: Adam's two moments, 4 bytes each, and a float32 master copy where the weights have fewer bits, for
      each trainable weight;
    * activations: sbh (34 + 5 a s / h) bytes a layer in 16 bit, twice that in float32; without the 5 a s / h
      of the attention probabilities where attention is fused;
    * logits: 4 sbv bytes, kept in float32 for the loss.

    No interpreter, libraries or temporary buffers: a floor for what a process would show. No activation checkpointing.
    With few trainable weights (LoRA) nearly all activations are still kept, so they are counted in full.

    Args:
        shape: the model's numbers.
        batch: b, rows in one backward pass (a micro-batch).
        seq: s, tokens in one row, padding included.

    Returns:
        MiB by part: weights, gradients, optimizer, activations, logits.

    Example:
        >>> shape = ModelShape(1_000_000, 1_000_000, num_layers=2, hidden=64, num_heads=4, vocab=1000)
        >>> {part: round(mb, 2) for part, mb in backprop_parts_mb(shape, batch=8, seq=32).items()}
        {'weights': 3.81, 'gradients': 3.81, 'optimizer': 7.63, 'activations': 2.75, 'logits': 0.98}

    References: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models
        (arXiv 2205.05198), equation 1 and section 4.3; Rajbhandari et al. 2020 (ZeRO), section 3.1, for the states.
    """
    s, b, h, a = seq, batch, shape.hidden, shape.num_heads
    quadratic = 5 * a * s / h if shape.eager_attention else 0.0
    in_16_bit = s * b * h * (34 + quadratic)  # equation 1
    states = 8 + (4 if shape.weight_bytes < 4 else 0)
    in_bytes = {
        "weights": shape.num_params * shape.weight_bytes,
        "gradients": shape.num_trainable * shape.weight_bytes,
        "optimizer": shape.num_trainable * states,
        "activations": shape.num_layers * in_16_bit * (2 if shape.weight_bytes >= 4 else 1),
        "logits": 4 * s * b * shape.vocab,
    }
    return {part: size / _MB for part, size in in_bytes.items()}


def backprop_estimate_mb(shape: ModelShape, *, batch: int, seq: int) -> float:
    """The sum of `backprop_parts_mb`, MiB.

    Example:
        >>> shape = ModelShape(1_000_000, 1_000_000, num_layers=2, hidden=64, num_heads=4, vocab=1000)
        >>> round(backprop_estimate_mb(shape, batch=8, seq=32), 1)
        19.0
    """
    return sum(backprop_parts_mb(shape, batch=batch, seq=seq).values())


def model_shape(model: Any, num_trainable: int | None = None) -> ModelShape | None:
    """Read a Hugging Face model's numbers from its weights and its config.

    Args:
        model: a PreTrainedModel, or a peft model around one.
        num_trainable: how many weights backpropagation would train; all of them when None.

    Returns:
        The shape, or None when the config does not say how deep, how wide or of how many heads the model is.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    layers, hidden, heads = (
        getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not layers or not hidden or not heads:
        return None
    if getattr(text, "is_encoder_decoder", False):  # num_hidden_layers is then the encoder's
        layers += getattr(text, "decoder_layers", None) or getattr(text, "num_decoder_layers", None) or 0
    params = list(model.parameters())
    num_params = sum(p.numel() for p in params)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return ModelShape(
        num_params=num_params,
        num_trainable=num_params if num_trainable is None else num_trainable,
        num_layers=layers,
        hidden=hidden,
        num_heads=heads,
        vocab=0 if head is None else getattr(text, "vocab_size", None) or 0,
        weight_bytes=max((p for p in params), key=lambda p: p.numel()).element_size() if params else 4,
        eager_attention=getattr(config, "_attn_implementation", "eager") == "eager",
    )
