"""Positions of a text behind a trained prompt or prefix, counted by the attention mask: padding counts for none."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import nn, torch

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING")


def count_by_mask(model: nn.Module) -> nn.Module:
    """Number the positions of a model with a prompt or prefix by its attention mask; other models are left as they are.

    peft puts the prompt in front of padded rows, and a class that numbers positions from 0 (rotary ones) sees the text
    at another distance from the prompt in every batch: a row's logits would depend on how far it is padded. By the mask
    they are those of the row alone. A prefix whose config says ``positions_from_zero`` takes none of them.

    Args:
        model: a peft model, or any other; calling this twice changes nothing more.
    """
    config = getattr(model, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", ""))
    base = model.get_base_model() if kind in PROMPTS else None  # type: ignore[operator]
    if base is None or not takes_positions(base):
        return model
    behind = config.num_virtual_tokens if getattr(config, "positions_from_zero", False) else 0  # type: ignore[union-attr]
    if not any(getattr(hook, "func", None) is _with_positions for hook in base._forward_pre_hooks.values()):
        base.register_forward_pre_hook(partial(_with_positions, behind), with_kwargs=True)
    return model


def forget_positions(base: nn.Module) -> None:
    """Take back what :func:`count_by_mask` has put on the model below a prompt or prefix."""
    for number, hook in list(base._forward_pre_hooks.items()):
        if getattr(hook, "func", None) is _with_positions:
            del base._forward_pre_hooks[number]
            base._forward_pre_hooks_with_kwargs.pop(number, None)


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """What an adapter's folder says of itself; nothing where the folder is none.

    Raises:
        UserError: the file is damaged.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise UserError(f"{file} is no adapter's config: it holds no mapping")
    return said


def counts_from_zero(folder: str | Path) -> bool:
    """Whether an adapter's folder says that the text's first token stands at position 0."""
    return bool(adapter_config(folder).get("positions_from_zero"))


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward takes the position of each token."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _with_positions(
    behind: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """``behind``: tokens of a prefix that the text's positions, and those peft has added, are not to count."""
    del module
    mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
    tokens = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
    if given is not None:  # while a text is written
        return (args, kwargs | {"position_ids": given - behind}) if behind else None
    if tokens is None or (mask is None and not behind) or (mask is not None and mask.dim() != 2):
        return None
    rows, length = tokens.shape[:2]
    if mask is None:  # nothing is padded: positions go on where the cache ends
        past = kwargs.get("past_key_values")
        mask = torch.ones(rows, length + (0 if past is None else past.get_seq_length()), device=tokens.device)
    positions = mask.to(torch.int64).cumsum(-1).sub(1 + behind).clamp_min(0)  # [B, prompt + T]
    return args, kwargs | {"position_ids": positions[:, -length:]}
