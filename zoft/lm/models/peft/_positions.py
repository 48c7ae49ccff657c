"""Positions behind a trained prompt, counted by the attention mask: padding between prompt and text counts for none."""

from __future__ import annotations

import inspect
from typing import Any

from zoft.utils.lazy import nn, torch


def count_by_mask(model: nn.Module) -> nn.Module:
    """Number the positions of a prompt-tuned model by its attention mask; other models are left as they are.

    peft puts the prompt in front of padded rows and drops ``position_ids``, so that a class which numbers positions
    from 0 (rotary ones) sees the text at another distance from the prompt in every batch: a row's logits would depend
    on how far it is padded. By the mask they are those of the row alone.

    Args:
        model: a peft model, or any other; calling this twice changes nothing more.

    Returns:
        The same model.
    """
    config = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
    base = model.get_base_model() if kind in ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING") else None  # type: ignore[operator]
    if base is None or "position_ids" not in inspect.signature(base.forward).parameters:
        return model
    if not any(hook is _with_positions for hook in base._forward_pre_hooks.values()):
        base.register_forward_pre_hook(_with_positions, with_kwargs=True)
    return model


def _with_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    del module
    mask = kwargs.get("attention_mask")
    tokens = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if mask is None or mask.dim() != 2 or tokens is None or kwargs.get("position_ids") is not None:
        return None
    positions = mask.to(torch.int64).cumsum(-1).sub(1).clamp_min(0)  # [B, prompt + T]
    return args, kwargs | {"position_ids": positions[:, -tokens.shape[1] :]}
