"""A model over several devices: what model.device_map may be, and a refusal where a tensor has no values in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from zoft.errors import UserError, did_you_mean
from zoft.utils.lazy import nn, torch

STRATEGIES = ("auto", "balanced")
"""auto and balanced: accelerate cuts the model into whole layers, as many on each GPU as have room there."""

_GIVEN = "_zoft_device_map"  # not hf_device_map: with the CPU in that, save_pretrained looks for offloaded modules
_DEVICE = re.compile(r"cpu|cuda(:\d+)?|\d+")
_INSTEAD = "use engine=offload, which trains weights that rest in memory or in a file"


def check_device_map(given: object) -> None:
    """Refuse what is no device map, and one that leaves weights where no step reaches them.

    Args:
        given: the value of model.device_map: a member of :data:`STRATEGIES`, a device for the whole model ("cpu",
            "cuda:1", 1), a mapping from the names of modules to devices, or None.

    Raises:
        UserError: another value, or a module on disk or on meta.

    Example:
        >>> check_device_map({"model.embed_tokens": 0, "model.layers": 1, "model.norm": 1, "lm_head": 1})
    """
    if given is None or given in STRATEGIES:
        return
    parts = given if isinstance(given, Mapping) else {"": given}
    for name, device in parts.items():
        if device in ("disk", "meta"):
            raise UserError(
                f"model.device_map puts {name or 'the model'} on {device}, from where accelerate brings weights for "
                f"each forward, and a step into them would be lost: {_INSTEAD}"
            )
        if not isinstance(name, str) or isinstance(device, bool) or not _DEVICE.fullmatch(str(device)):
            raise UserError(
                f"model.device_map must be {', '.join(STRATEGIES)}, a device (cpu, cuda:0, 1), or a mapping from names "
                f"of modules to devices, e.g. {{model.layers: 0, lm_head: 1}}; got {given!r}"
            )
    if not parts:
        raise UserError("model.device_map is an empty mapping: name modules and their devices, or leave it out")


def placing_arguments(given: Any) -> dict[str, Any]:
    """What ``from_pretrained`` is given for a device map; nothing for None.

    Raises:
        UserError: as :func:`check_device_map`; a GPU that this machine lacks; a process of several.
    """
    if given is None:
        return {}
    check_device_map(given)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "model.device_map spreads one model over the devices of one process, and torchrun has started several: "
            "leave it out, or start the run without torchrun"
        )
    if given in STRATEGIES:
        return {"device_map": given}
    parts = dict(given) if isinstance(given, Mapping) else {"": given}
    placed = {name: int(device) if str(device).isdecimal() else str(device) for name, device in parts.items()}
    count = torch.cuda.device_count()
    for name, device in placed.items():
        number = device if isinstance(device, int) else int(device.partition(":")[2] or 0)
        if device != "cpu" and number >= count:
            raise UserError(
                f"model.device_map puts {name or 'the model'} on {device}, and this machine has {count} GPUs: name "
                "others, or cpu"
            )
    if len(set(placed.values())) == 1 and next(iter(placed.values())) not in ("cpu", "cuda", "cuda:0", 0):
        raise UserError(
            f"model.device_map={given} is one GPU that is not the first, and rows go to the first: choose it by "
            "CUDA_VISIBLE_DEVICES instead"
        )
    return {"device_map": placed}


def know_device_map(model: nn.Module, given: Any) -> None:
    """Keep with a model where it was put; transformers does so only where that is more than one device.

    Raises:
        UserError: a mapping with names that the model does not have, or without a device for some of its tensors.
    """
    if not isinstance(given, Mapping):
        return
    modules = {name for name, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]}
    unknown = next((name for name in given if name not in modules), None)
    if unknown is not None:
        raise UserError(f"model.device_map names {unknown}, which the model lacks.{did_you_mean(unknown, modules)}")
    tensors = (name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    left = next((name for name in tensors if not any(f"{name}.".startswith(f"{key}.") for key in given if key)), None)
    if left is not None and "" not in given:
        raise UserError(f"model.device_map names no device for {left}: name its module too")
    vars(model)[_GIVEN] = dict(given)


def require_in_memory(model: nn.Module, name: str) -> None:
    """Refuse a model of which accelerate keeps a part on disk or in the CPU's memory, to bring it for each forward.

    Such tensors are on the meta device between forwards: a step into them does nothing, and says nothing.

    Raises:
        UserError: naming a tensor without values.
    """
    away = [key for key, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if away:
        raise UserError(
            f"model.name={name} does not fit into the memory that model.device_map may use: accelerate has left "
            f"{len(away)} tensors ({away[0]}, ...) on meta, to bring them for each forward, and a step into them would "
            f"be lost: {_INSTEAD}, or load fewer bytes (model.dtype=bfloat16)"
        )


def is_spread(model: Any) -> bool:
    """Whether a device map has put the model on more than one device; moving it to one would undo that."""
    return len(_devices(model)) > 1


def require_run_on(model: Any, device: torch.device) -> None:
    """Refuse a model that its device map keeps on the CPU while the run is on a GPU, which would move it there.

    Raises:
        UserError: saying what makes the run one on the CPU.
    """
    if _devices(model) == {"cpu"} and device.type != "cpu":
        raise UserError(
            "model.device_map keeps the model on the CPU, and the run is on a GPU: set trainer.use_cpu=true"
        )


def on_device(model: Any, device: torch.device) -> Any:
    """The model on the run's device; one that is spread over several stays where it is.

    Raises:
        UserError: as :func:`require_run_on`.
    """
    require_run_on(model, device)
    return model if is_spread(model) else model.to(device)


def _devices(model: Any) -> set[str]:
    device_map = getattr(model, "hf_device_map", None) or getattr(model, _GIVEN, None)
    return {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
