"""A run's model without its weights: every tensor's shape and dtype on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from zoft.errors import UserError
from zoft.lm.hub import not_waited_for
from zoft.lm.models.files import placed
from zoft.lm.models.load import class_of
from zoft.lm.models.quantized import NF4_BLOCK
from zoft.utils.lazy import Tensor, torch


def meta_model(
    kind: str, name: str, *, revision: str | None, dtype: str, attention: str | None, num_labels: int
) -> Any:
    """The model of a name as :func:`zoft.lm.models.load.load_model_as` would load it; of its files the config is read.

    Args:
        kind: a key of :data:`zoft.lm.models.load.KINDS`.
        name: a local folder, a hub name, or ``zoft:NAME``.
        revision: branch, tag or commit on the hub.
        dtype: float32, bfloat16 or float16.
        attention: eager, sdpa, ...; None takes transformers' choice.
        num_labels: classes of a classifier.

    Raises:
        UserError: no such folder or hub model, or a config that no model is made from.
    """
    import transformers

    try:
        with not_waited_for():
            config = transformers.AutoConfig.from_pretrained(placed(name), revision=revision, trust_remote_code=False)
        if kind == "classifier":
            config.num_labels = num_labels
            loader: Any = transformers.AutoModelForSequenceClassification
        else:
            loader = class_of(name, revision) or transformers.AutoModelForCausalLM
        more = {"attn_implementation": attention} if attention else {}
        # from_config makes every tensor; on the meta device none takes memory
        with torch.device("meta"):
            make = loader.from_config if hasattr(loader, "from_config") else loader._from_config
            return make(config, dtype=getattr(torch, dtype), **more).eval()
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"could not read the config of model.name={name}: {first_line:.200}") from error


def wrapped_on_meta(model: Any, wrap: Callable[[Any], Any]) -> Any:
    """A model on the meta device with an adapter in memory, whose first numbers are those that it has on any base.

    Args:
        model: as :func:`meta_model` makes it.
        wrap: puts the adapter on; sees weights of the right shape that take no memory and are all zero.
    """
    # zeros of any size take one number: expand() repeats it
    _replace(model, lambda p: torch.zeros((), dtype=p.dtype).expand(p.shape))
    base = {id(parameter) for parameter in model.parameters()}
    wrapped = wrap(model)
    # the base goes back to meta, the adapter's own numbers stay
    _replace(wrapped, lambda p: torch.empty_like(p, device="meta") if id(p) in base else None)
    return wrapped


def quantize_on_meta(model: Any, quantization: str) -> None:
    """Give a model without weights the sizes and dtypes that it has in few bits: codes, and scales beside them.

    Args:
        model: on the meta device, with or without an adapter.
        quantization: a member of :data:`zoft.lm.models.quantized.QUANTIZATIONS`.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole = set(get_keys_to_not_convert(base))
    for name, module in base.named_modules():
        plain = name.removesuffix(".base_layer")  # what an adapter has put itself in front of
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and plain not in whole:
            four, count = quantization == "nf4", module.weight.numel()
            stored = torch.empty((count // 2, 1) if four else module.weight.shape, dtype=torch.int8, device="meta")
            codes: Any = torch.nn.Parameter(stored, requires_grad=False)
            if four:
                scales = torch.empty(-(-count // NF4_BLOCK), device="meta")
                codes.quant_state = SimpleNamespace(absmax=scales, nested=False, shape=module.weight.shape)
            else:
                codes.SCB = torch.empty(module.out_features, device="meta")
            module.weight = codes
    base.is_quantized = True


def _replace(model: Any, make: Callable[[Tensor], Tensor | None]) -> None:
    """Frozen parameters anew, tied ones once; None leaves one as it is."""
    replaced: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            # tied parameters are one object, and must be again
            if id(parameter) not in replaced:
                new = make(parameter)
                replaced[id(parameter)] = parameter if new is None else torch.nn.Parameter(new, requires_grad=False)
            module._parameters[name] = replaced[id(parameter)]
