"""A quantised model without a quantiser's package: tiny, 8-bit codes, and a scale a row where bitsandbytes has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests import models


class CodedLinear(nn.Linear):
    """y = (x codes^T) * scales + b, with int8 codes.

    Args:
        linear: the layer that it takes the place of.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1) / 127
        codes = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias
        self.state = SimpleNamespace(SCB=scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Codes are multiplied with as they are, scales afterwards."""
        y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.state.SCB.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "SCB"] = self.state.SCB

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.state.SCB = state_dict.pop(prefix + "SCB")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Quantizer:
    """What transformers asks a quantiser before it trains."""

    is_trainable = False
    is_qat_trainable = False
    quantization_config = SimpleNamespace(quant_method="few bits")


def coded(model: Any) -> Any:
    """The model with its linear layers in codes, but for the head; transformers takes it for a quantised one."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, CodedLinear(module))
    model.hf_quantizer, model.is_quantized = Quantizer(), True
    return model


def with_trained_scales(**fields: Any) -> Any:
    """A tiny coded OPT whose scales are what is trained."""
    from zoft.lm.models.trainable.scales import Scales

    model = coded(models.tiny_opt(**fields))
    Scales().apply(model)
    return model
