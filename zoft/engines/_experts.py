"""Experts whose matrices lie in one tensor: what each is given inside a part, and where its gradients are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from zoft.utils.lazy import Tensor, nn, torch


@dataclass(frozen=True)
class ExpertCall:
    """One product of one expert's matrix.

    Args:
        number: of the expert.
        x: its rows, [k, n] float32.
        zero: [k, m] float32, added to what it gives: the loss's gradient in it is e.
    """

    number: int
    x: Tensor
    zero: Tensor


@contextmanager
def calls_of(tensors: Mapping[str, Tensor], experts: Mapping[str, nn.Module]) -> Iterator[dict[str, list[ExpertCall]]]:
    """Within this block products with matrices of these tensors are noted: key -> calls, in the order they are made.

    Args:
        tensors: key -> [E, m, n], of E experts.
        experts: key -> the module that holds the tensor.
    """
    calls: dict[str, list[ExpertCall]] = {key: [] for key in tensors}
    # most parts hold no experts, and a mode is asked about every call of torch
    if not tensors:
        yield calls
        return

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func is not torch.nn.functional.linear or len(args) < 2:
                return output
            x, weight = args[0], args[1]
            for key, tensor in tensors.items():
                number = _number(tensor, weight)
                if number is not None:
                    # a zero of its own for every call: an expert sees no other rows, and each of its rows once
                    zero = torch.zeros(output.shape, device=output.device, requires_grad=True)
                    calls[key].append(ExpertCall(number, x.detach().float(), zero))
                    return output + zero.to(output.dtype)
            return output

    with _one_by_one(experts.values()), Noting():
        yield calls


def _number(tensor: Tensor, matrix: Tensor) -> int | None:
    """Which of the tensor's matrices this is; None where it lies elsewhere."""
    if matrix.shape != tensor.shape[1:] or matrix.stride() != tensor.stride()[1:]:
        return None
    if matrix.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None
    number, remainder = divmod(int(matrix.storage_offset()) - int(tensor.storage_offset()), tensor.stride(0))
    return number if remainder == 0 and 0 <= number < len(tensor) else None


@contextmanager
def _one_by_one(experts: Any) -> Iterator[None]:
    """Within this block transformers' experts are computed one after the other, and not in one grouped product."""
    configs = {id(config): config for module in experts if (config := getattr(module, "config", None)) is not None}
    were = [(config, getattr(config, "_experts_implementation", None)) for config in configs.values()]
    for config, _ in were:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, before in were:
            config._experts_implementation = before
