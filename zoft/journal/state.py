"""Nested state of tensors and plain numbers as safetensors bytes, and back: nothing that is loaded can run code."""

from __future__ import annotations

import json
from typing import Any

from zoft.errors import UserError
from zoft.utils.lazy import Tensor, torch

_TREE = "tree"


def pack(state: Any) -> bytes:
    """Dicts with string or int keys, lists, tuples, numbers, strings, None and tensors, to the bit.

    Example:
        >>> unpack(pack({"a": [1, 2.5, None], 3: (torch.ones(2),)}))
        {'a': [1, 2.5, None], 3: (tensor([1., 1.]),)}
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_taken_apart(state, tensors), separators=(",", ":"))
    return bytes(save(tensors, metadata={_TREE: tree}))


def unpack(data: bytes) -> Any:
    """The values that :func:`pack` made these bytes of; tensors are on the CPU.

    Raises:
        UserError: bytes that :func:`pack` did not write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        tree = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_TREE])
        return _put_together(tree, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"saved state cannot be read: {error}") from None


def _taken_apart(state: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = state.detach().cpu().contiguous().clone()
        return {"t": name}
    if isinstance(state, dict):
        return {"d": [[key, _taken_apart(value, tensors)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        kind = "l" if isinstance(state, list) else "u"
        return {kind: [_taken_apart(value, tensors) for value in state]}
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise TypeError(f"state holds a {type(state).__name__}")


def _put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "t":
        return tensors[value]
    if kind == "d":
        return {key: _put_together(each, tensors) for key, each in value}
    items = [_put_together(each, tensors) for each in value]
    return items if kind == "l" else tuple(items)
