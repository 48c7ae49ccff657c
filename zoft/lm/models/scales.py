"""The scales of a quantised base as what is trained: a step for the logarithm of each, taken while its layer computes.

A quantised matrix is codes times scales, W = s * code. What moves is u in s = s0 exp(u), a float32 parameter
``log_scale`` beside the codes: steps are relative, a scale stays above zero, and u = 0 is the base to the bit. The
layer is given s for its own forward alone; s0 and the codes are never written, so there is nothing to restore.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch

LOG_SCALE = "log_scale"
"""Attribute of a quantised layer, and so the last part of the parameter's name."""


@dataclass(frozen=True)
class Scale:
    """Where a layer keeps its scales.

    Args:
        holder: the object that has them.
        attribute: under which name.
        key: under which name the layer's ``state_dict`` has them.
    """

    holder: Any
    attribute: str
    key: str

    @property
    def value(self) -> Tensor:
        """The scales as they were loaded: s0."""
        return getattr(self.holder, self.attribute)


def scale_of(module: nn.Module) -> Scale | None:
    """The scales of a layer; None where it is not quantised.

    Args:
        module: bitsandbytes' linear layers of 8 bits (a scale a row) and 4 bits (a scale for 64 weights), torchao's.

    Raises:
        UserError: its scales are stored as codes themselves.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    for holder in (weight, getattr(module, "state", None)):  # bitsandbytes moves them in the layer's first forward
        if isinstance(getattr(holder, "SCB", None), torch.Tensor):
            return Scale(holder, "SCB", "SCB")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "nested", False):
            raise UserError(
                "trainable=scales steps on scales, and this base has them quantised once more "
                "(bnb_4bit_use_double_quant): load it with model.quantization=nf4, or train an adapter (peft=lora)"
            )
        return Scale(state, "absmax", "weight.absmax")
    is_torchao = hasattr(weight, "__tensor_flatten__") and hasattr(weight, "scale")
    return Scale(weight, "scale", "weight") if is_torchao else None


def attach(model: nn.Module) -> list[str]:
    """Put ``log_scale`` = 0 beside the codes of every quantised layer, and have the layers compute with it.

    From then on ``state_dict`` (and so ``save_pretrained``) gives the moved scales under the quantiser's own names:
    what is saved is an ordinary quantised model.

    Returns:
        The new parameters' names, as in ``named_parameters()``.

    Raises:
        UserError: there is no quantised layer, or one whose scales cannot move.
    """
    layers = [(name, module, scale_of(module)) for name, module in model.named_modules()]
    scaled = [(name, module, scale) for name, module, scale in layers if scale is not None]
    if not scaled:
        raise UserError(
            "trainable=scales steps on the scales of a quantised base, and this model has none that zoft knows "
            "(bitsandbytes' nf4 and int8, torchao's int8): give model.quantization=nf4, or choose another trainable="
        )
    for _, module, scale in scaled:
        if LOG_SCALE not in module._parameters:
            zeros = torch.zeros(scale.value.numel(), dtype=torch.float32, device=scale.value.device)
            module.register_parameter(LOG_SCALE, torch.nn.Parameter(zeros))
            module.forward = functools.partial(_forward, module, module.forward)
            module.register_state_dict_post_hook(_save_moved)
    _let_the_trainer_train(model)
    return [f"{name}.{LOG_SCALE}" if name else LOG_SCALE for name, _, _ in scaled]


def has_trained_scales(model: nn.Module) -> bool:
    """Whether scales of this model are what is trained."""
    return any(LOG_SCALE in module._parameters for module in model.modules())


def moved(scale: Tensor, log_scale: Tensor) -> Tensor:
    """The scales that a layer computes with and that are saved: s0 exp(u), rounded once to the dtype of s0.

    Example:
        >>> moved(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor([2.])
    """
    # s = s0 exp(u)
    return (scale.float() * log_scale.detach().view_as(scale).exp()).to(scale.dtype)


def _forward(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    with _moved_scales(module):
        return forward(*args, **kwargs)


@contextmanager
def _moved_scales(module: nn.Module) -> Iterator[None]:
    """The layer has its moved scales in here, and those it was loaded with afterwards."""
    if getattr(module.weight, "CB", None) is not None:  # bitsandbytes' first forward: it moves its scales elsewhere
        module.init_8bit_state()  # type: ignore[operator]
    scale = scale_of(module)
    assert scale is not None, "attached to it"
    clean = scale.value
    try:
        with torch.no_grad():
            setattr(scale.holder, scale.attribute, moved(clean, module.get_parameter(LOG_SCALE)))
        yield
    finally:
        setattr(scale.holder, scale.attribute, clean)


def _save_moved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A layer's part of ``state_dict``: the moved scales under the loaded ones' names, without zoft's own tensors."""
    del metadata
    log_scale, scale = state.pop(prefix + LOG_SCALE), scale_of(module)
    assert scale is not None, "attached to it"
    now = moved(scale.value, log_scale)
    if scale.key != "weight":
        state[prefix + scale.key] = now
        return
    names, context = scale.holder.__tensor_flatten__()  # torchao's: codes and scales are one tensor
    parts = {name: now if name == scale.attribute else getattr(scale.holder, name) for name in names}
    whole = type(scale.holder).__tensor_unflatten__(parts, context, None, None)
    state[prefix + scale.key] = whole


def _let_the_trainer_train(model: nn.Module) -> None:
    """Answer transformers' question whether a quantised model without an adapter can be trained as it is: yes.

    ``validate_quantization_for_training`` asks the quantiser, which speaks of gradients: none of them is computed here.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_qat_trainable", False):
        kind = type(quantizer)
        quantizer.__class__ = type(kind.__name__, (kind,), {"is_qat_trainable": True, "is_trainable": True})
