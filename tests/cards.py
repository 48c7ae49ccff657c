"""Two cards that are not there: a device type of its own, whose tensors have shapes and devices but no values.

torch's fake tensors compute shapes, and refuse an operation on tensors of two devices as a card would: what is made on
the wrong device shows on any machine. :func:`register` makes the device type ``card`` known.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from zoft.noise import kernels


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, device: int) -> bool:
        return device >= 0

    def is_built(self) -> bool:
        return True


def register() -> None:
    """Make the device type known, to the whole process and for good; a second call does nothing."""
    if hasattr(torch, "card"):
        return
    module: Any = types.ModuleType("torch.card")
    module.is_available = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.utils.rename_privateuse1_backend("card")
    torch._C._acc.register_python_privateuseone_hook(_Hooks())
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())
    torch._register_device_module("card", module)


class _FromValues(TorchFunctionMode):
    """``torch.tensor(values, device=...)`` in two steps: torch would copy to the device below what pretends."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


@contextmanager
def pretended() -> Iterator[None]:
    """Within this block tensors have no values; they can be made on ``card:0`` and ``card:1``."""
    _forget_tables()
    try:
        with kernels.using(torch.device("cpu"), None), FakeTensorMode(), _FromValues():  # those read memory
            yield
    finally:
        _forget_tables()


def _forget_tables() -> None:
    """What zoft makes once for each device: of these there are some without values."""
    for module in [module for name, module in sys.modules.items() if name.startswith("zoft.")]:
        for cached in vars(module).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()


def like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor of the same shape and dtype on a card; to be called inside :func:`pretended`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def put_on(module: nn.Module, device: str) -> None:
    """Replace what a module holds by tensors on a card, tied ones once."""
    copies: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                on = copies.get(id(parameter))
                if on is None:
                    on = copies[id(parameter)] = nn.Parameter(like(parameter, device), parameter.requires_grad)
                part._parameters[name] = copies[id(on)] = on
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer, device)


def spread(model: nn.Module, later: list[nn.Module], first: str = "card:0", second: str = "card:1") -> None:
    """A model on two cards, as accelerate's dispatch has it: inputs go to where a module is.

    Args:
        model: is on ``first``.
        later: modules that go to ``second``.
    """

    def moved(value: Any, device: str) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(moved(one, device) for one in value)
        return value

    put_on(model, first)
    for module in later:
        put_on(module, second)
        module.register_forward_pre_hook(
            lambda _m, args, kwargs: (moved(args, second), {k: moved(v, second) for k, v in kwargs.items()}),
            with_kwargs=True,
        )
        module.register_forward_hook(lambda _m, _i, output: moved(output, first))
