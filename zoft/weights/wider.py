"""A 16-bit model in float32, for a trial: what rounding to 16 bits hides shows, at the cost of one block's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from zoft.utils.lazy import nn, torch

TOLERANCE = 2e-5
"""How far apart two ways of computing the same numbers may be in float32, relative to the largest one."""


@contextmanager
def widened(model: nn.Module) -> Iterator[torch.dtype | None]:
    """Within this block forwards compute in float32 what they compute in 16 bits otherwise.

    Every block, and every module outside of the blocks, gets its wider weights for the time of its own forward, so that
    no more than one of them is there twice. Embeddings are looked up as they are: copying does not round. Not float64
    for a float32 model: classes compute norms and softmax in float32 whatever they are given, and then overflow.

    Yields:
        float32; None, and nothing is changed, where nothing is computed in 16 bits, and where weights are quantised:
        they have no wider form.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 1)).bfloat16()
        >>> with widened(model):
        ...     model(torch.tensor([1])).dtype == torch.float32
        True
        >>> model[1].weight.dtype
        torch.bfloat16
    """
    floats = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    quantised = getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters())
    device = floats[0].device.type if floats else "cpu"
    # autocast computes in 16 bits whatever the weights are
    narrow = torch.is_autocast_enabled(device) or any(tensor.element_size() < 4 for tensor in floats)
    if quantised or not narrow:
        yield None
        return
    dtype = torch.float32
    units, above = _units(model)
    # what stands above the units has few tensors of its own: wider for the whole block
    # under autocast float32 weights would be rounded again
    with ExitStack() as undo, torch.autocast(device, enabled=False):
        for module in above:
            undo.callback(_widen(module, dtype))
        for handle in [handle for unit in units for handle in _around(unit, dtype)]:
            undo.enter_context(handle)
        yield dtype


def _units(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """(the largest modules without a list of blocks in them, what stands above these)."""
    if not any(isinstance(inside, torch.nn.ModuleList) for inside in module.modules()):
        return [module], []
    units: list[nn.Module] = []
    above = [module]
    for child in module.children():
        more = _units(child)
        units += more[0]
        above += more[1]
    return units, above


def _around(unit: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Hooks that give a module its wider weights while it runs."""
    if type(unit) is torch.nn.Embedding:
        return [unit.register_forward_hook(lambda _module, _args, output: output.to(dtype))]
    undo: list[Callable[[], None]] = []

    def enter(*_: Any) -> None:
        # before every other hook, which may read the weights; undone in reverse when the unit is left
        undo.extend(_widen(module, dtype) for module in unit.modules())

    def leave(*_: Any) -> None:
        while undo:
            undo.pop()()

    return [unit.register_forward_pre_hook(enter, prepend=True), unit.register_forward_hook(leave, always_call=True)]


def _widen(module: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Replace a module's own tensors by wider ones; returns a function that puts them back."""
    earlier: list[tuple[dict[str, Any], dict[str, Any]]] = []
    kinds: list[dict[str, Any]] = [module._parameters, module._buffers]
    for tensors in kinds:
        earlier.append((tensors, dict(tensors)))
        for name, tensor in tensors.items():
            # what is wide enough, or no float (masks, positions), stays as it is
            if tensor is not None and tensor.is_floating_point() and tensor.element_size() < 4:
                wide = tensor.detach().to(dtype)
                tensors[name] = torch.nn.Parameter(wide, False) if tensors is module._parameters else wide

    def put_back() -> None:
        for tensors, before in earlier:
            tensors.update(before)

    return put_back
