"""Weights whose numbers GGUF stores in another order than transformers."""

from __future__ import annotations

from typing import Any

from zoft.utils.lazy import Tensor


def rotated(key: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of queries and keys in llama's order: pairs side by side, where transformers has halves.

    Args:
        key: the weight's name, which ends with that of its module and ``.weight``.
        tensor: [rows, columns], of the weight or of a factor with its rows (LoRA's B).
        config: the model's.

    Returns:
        [rows, columns]; the tensor itself where both have the same order.
    """
    if config.model_type != "llama" or not key.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
    rows, columns = tensor.shape
    # row = (head, half, place in it) -> (head, place, half)
    return tensor.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
