"""How a causal language model is called: what its class takes, positions that skip padding, no cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn
from zoft.weights.elsewhere import runtime_of

Inputs = dict[str, Any]
"""Keyword arguments of a model's forward; ``input_ids`` [B, T] is among them."""


def inner(model: Any) -> Any:
    """The transformers model inside adapters and compilation."""
    bare = getattr(model, "_orig_mod", model)
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of the model's class names this argument."""
    return name in _parameters(type(inner(model)).forward)


def is_compiled(model: Any) -> bool:
    """Whether the whole model runs as compiled code, which does not see a head that is replaced for one call."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in (model, inner(model)))


def arguments(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Inputs:
    """What left-padded rows are called with, [B, T] each.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[0, 0, 1, 1]])
        >>> class Model(torch.nn.Module):
        ...     def forward(self, input_ids, attention_mask, position_ids): ...
        >>> arguments(Model(), mask, mask)["position_ids"].tolist()
        [[0, 0, 0, 1]]
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes(model, "position_ids"):
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_min_(0)
    return inputs


def refuse_elsewhere(model: nn.Module) -> None:
    """Refuse to call a model whose forward runs elsewhere, where log-probabilities of tokens are all there is.

    Raises:
        UserError: it does.
    """
    if runtime_of(model) is not None:
        raise UserError(
            "the model's forward runs elsewhere, where tokens are scored and nothing else of it can be had: choose an "
            "objective that scores tokens (objective=options, cross_entropy), or engine=auto"
        )


def called(model: nn.Module, inputs: Mapping[str, Any], **more: Any) -> Tensor:
    """The logits of one call, [B, T, V] or what the head was made to give; no key-value cache is built."""
    parameters = _parameters(type(inner(model)).forward)
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        more["use_cache"] = False
    output = model(**{**inputs, **more})
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


@cache
def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters
