"""Cards that are not there, whose tensors hold their values on the CPU: for code that reads what it computes.

What a tensor on ``card:0`` is asked for is carried out by the CPU's kernels, so everything gives the CPU's bits; but an
operation on tensors of two devices is refused as CUDA refuses it. tests/cards.py makes the device type known, and has
cards without values, which are faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from zoft.noise import kernels


class OnCard(torch.Tensor):
    """A tensor of a card.

    Args:
        held: its values, on the CPU; views of one are views of the other.
        device: the card.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> OnCard:
        where = {"storage_offset": held.storage_offset(), "dtype": held.dtype, "device": device}
        with torch.inference_mode(False):  # a view of a tensor from outside of it has that one's counter of versions
            wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), **where)
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


_aten = torch.ops.aten
_ACROSS = {_aten.copy_.default, _aten._to_copy.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
"""CUDA takes indices from the CPU, too."""


def _carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation by the CPU's kernel on the held values; its result is where torch would have it."""
    devices: set[torch.device] = set()
    asked: list[torch.device] = []

    def held(one: Any) -> Any:
        if isinstance(one, OnCard):
            devices.add(one.device)
            return one.held
        if isinstance(one, torch.device):
            asked.append(one)
            return torch.device("cpu") if one.type == "card" else one
        if isinstance(one, torch.Tensor) and one.dim():  # a number may come from the CPU
            devices.add(one.device)
        return one

    if func in _INDEXING:
        held(args[0])
        wanted = set(devices)
    plain, named = tree_map(held, (args, dict(kwargs)))
    if func in _INDEXING:
        devices = wanted | {device for device in devices if device.type == "card"}
    if len(devices) > 1 and func not in _ACROSS:
        raise RuntimeError(f"{func}: at least two devices, {' and '.join(sorted(map(str, devices), reverse=True))}")
    cards = [device for device in devices if device.type == "card"]
    where = cards[0] if cards else None
    if func is _aten.copy_.default:
        where = args[0].device if isinstance(args[0], OnCard) else None
    if asked:
        where = torch.device("card", asked[0].index or 0) if asked[0].type == "card" else None
    named.pop("pin_memory", None)
    out = func(*plain, **named)
    if where is None:
        return out
    # what is written in place is the tensor that was given
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, OnCard)] if func._schema.is_mutable else []
    same = {id(one.held): one for one in given}

    def on_card(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return same[id(one)] if id(one) in same else OnCard(one, where)

    return tree_map(on_card, out)


class _Made(TorchDispatchMode):
    """Tensors made from nothing, and brought from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


_MEMORY = ("tolist", "untyped_storage", "data_ptr")
"""Methods that read memory and are no operations."""


def _index(one: Any) -> Any:
    """A list that chooses elements, as a tensor: torch would bring it to the device below what pretends."""
    return torch.tensor(one) if isinstance(one, list) else one


class _Python(TorchFunctionMode):
    """What torch does below all operations: ``torch.tensor(values, device=...)``, ``tensor.data = other``, memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.data.__set__ and isinstance(args[0], OnCard):
            args[0].held = args[1].held
        if getattr(func, "__name__", "") in _MEMORY and isinstance(args[0], OnCard):
            return getattr(args[0].held, func.__name__)()
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnCard):
            args = (args[0], tree_map(_index, args[1], is_leaf=lambda one: isinstance(one, list)))
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


@contextmanager
def held() -> Iterator[None]:
    """Within this block tensors can be made on ``card:0`` and ``card:1``, and have values."""
    with kernels.using(torch.device("cpu"), None), _Python(), _Made():  # compiled noise reads memory
        yield


def put_on(value: Any, device: str) -> Any:
    """A module, in place, or what is in a batch, on a card; to be called inside :func:`held`."""
    if isinstance(value, nn.Module):
        for part in value.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer.to(device)
        return value
    if isinstance(value, dict):
        return {key: put_on(one, device) for key, one in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
