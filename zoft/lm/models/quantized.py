"""Bases of few bits: which quantisations there are, how they are loaded, and the parts that a base is stored as."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, nn, torch

QUANTIZATIONS = ("nf4", "int8", "int8_torchao")
"""nf4: 4 bits in blocks of 64 (bitsandbytes); int8: 8 bits, a scale a row (bitsandbytes); int8_torchao: torchao's."""

NF4_BLOCK = 64
"""How many weights share a scale."""

_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao"}


def require_package(quantization: str) -> None:
    """Refuse a quantisation whose package is not installed.

    Args:
        quantization: one of :data:`QUANTIZATIONS`.

    Raises:
        UserError: with the command that installs it.
    """
    package = _PACKAGES[quantization]
    if find_spec(package) is None:
        raise UserError(
            f"model.quantization={quantization} needs the package {package}: pip install 'zoft[quant]' (or {package})"
        )


def loading_arguments(quantization: str | None, dtype: str, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """What ``from_pretrained`` is given for a base of few bits; nothing for None.

    Weights are read and quantised on the device where they stay: the first GPU, or the CPU. What is computed with them
    is computed in ``dtype``.

    Args:
        quantization: one of :data:`QUANTIZATIONS`, or None.
        dtype: of the computation and of what is not quantised: float32, bfloat16 or float16.
        stored: the ``quantization_config`` of a checkpoint that is quantised already.

    Raises:
        UserError: the package is not installed, or the checkpoint is quantised in another way.
    """
    if quantization is None:
        return {}
    import transformers

    require_package(quantization)
    place = {"device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    if stored:
        _require_stored_as(quantization, stored)
        return place
    if quantization == "int8_torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, **place}


def _require_stored_as(quantization: str, stored: dict[str, Any]) -> None:
    """A checkpoint's own quantisation holds, so another one that was asked for would be ignored."""
    if stored.get("quant_method") == "bitsandbytes":
        four = stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
        kind = "int8" if stored.get("load_in_8bit") else "nf4" if four else "bitsandbytes"
    elif stored.get("quant_method") == "torchao" and "Int8WeightOnly" in str(stored.get("quant_type")):
        kind = "int8_torchao"
    else:
        kind = str(stored.get("quant_method"))
    if kind != quantization:
        raise UserError(
            f"model.quantization={quantization} is asked for, and the checkpoint is quantised already, as {kind}: "
            "leave model.quantization out, or give the model that it was made from"
        )


def keep_codes_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit codes anew on a CPU.

    Its first forward there packs them for one kind of processor, and every ``state_dict()`` unpacks them with scales
    rounded to bfloat16: each save would change the base a little (bitsandbytes 0.50).

    Args:
        model: as loaded, before its first forward.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    # Every 8-bit layer says in every forward that its inputs are rounded to float16 on their way to 8 bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def is_quantized(model: nn.Module) -> bool:
    """Whether transformers loaded the model with weights of few bits, by this setting or because its files are so."""
    return bool(getattr(model, "is_quantized", False))


def dequantized(model: Any) -> Any:
    """The model with plain weights of the values that its codes stand for, for an export; a plain one as it is.

    Args:
        model: of transformers, without an adapter; a quantised one is changed.

    Raises:
        UserError: a quantisation whose values transformers cannot give.
    """
    if not is_quantized(model):
        return model
    quantizer = model.hf_quantizer
    # transformers has no way for torchao's, whose tensors have their own
    modules = [module for module in model.modules() if hasattr(module._parameters.get("weight"), "__tensor_flatten__")]
    for module in modules:
        module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    if modules:
        quantizer.remove_quantization_config(model)
        return model
    try:
        return model.dequantize()
    except NotImplementedError as error:
        raise UserError(
            f"the base is quantised by {quantizer.quantization_config.quant_method}, whose values transformers cannot "
            "give: export the adapter as it is, without --merge and --gguf"
        ) from error


def require_adapter(model: nn.Module, name: str) -> None:
    """Refuse a base of few bits with nothing on top that could move, where its scales are not what is trained.

    A step of training is far smaller than the distance between two codes, so codes cannot take it.

    Raises:
        UserError: the model is quantised and has no adapter.
    """
    if is_quantized(model) and not hasattr(model, "peft_config"):
        raise UserError(
            f"model.name={name} is quantised, and a step is too small for weights of few bits: train an adapter on top "
            "of them (peft=lora trainable=adapter; prefix and prompt too), or their scales (trainable=scales)"
        )


def num_weights(parameter: Tensor) -> int:
    """How many weights a parameter stands for: of 4 bits, two lie in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def stored_parts(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter is stored as: itself, or codes and scales of a quantised one.

    Args:
        parameter: of a module; a torchao tensor, a bitsandbytes parameter, or any other.

    Example:
        >>> import torch
        >>> [part.shape for part in stored_parts(torch.zeros(2, 3))]
        [torch.Size([2, 3])]
    """
    if hasattr(parameter, "__tensor_flatten__"):  # a tensor made of tensors: torchao's
        names, _ = parameter.__tensor_flatten__()
        return [part for name in names for part in stored_parts(getattr(parameter, name))]
    parts = [parameter.detach()]
    state = getattr(parameter, "quant_state", None)  # bitsandbytes, 4 bits
    if state is not None:
        parts += [state.absmax] + ([state.state2.absmax] if state.nested else [])
    scales = getattr(parameter, "SCB", None)  # bitsandbytes, 8 bits
    return parts + ([scales] if isinstance(scales, torch.Tensor) else [])
