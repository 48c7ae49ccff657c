"""Rows of a batch: the tensors that tell one from another, and a bounded store of what belongs to each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoft.utils.lazy import Tensor, torch

# Arguments of a model's call that cannot change its hidden states.
NOT_HIDDEN = {"labels", "num_items_in_batch", "logits_to_keep", "use_cache", "return_dict"}


def row_inputs(kwargs: dict[str, Any]) -> dict[str, Tensor] | None:
    """The [B, T] tensors of a call that decide its rows' hidden states, or None where something else decides too."""
    ids = kwargs.get("input_ids")
    if ids is None or ids.dim() != 2:
        return None
    inputs: dict[str, Tensor] = {}
    for name, value in kwargs.items():
        if name in NOT_HIDDEN or value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
            return None
        inputs[name] = value
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    if "position_ids" not in inputs and not bool(inputs["attention_mask"][:, 0].all()):
        return None  # left padding shifts positions in some models
    return inputs


def same_rows(inputs: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether two batches are the same rows in the same order, padded alike."""
    return inputs.keys() == others.keys() and all(
        value is others[name] or torch.equal(value, others[name]) for name, value in inputs.items()
    )


def row_key(row: dict[str, Tensor]) -> bytes:
    """The contents of one row: equal rows of different batches have the same key."""
    return b"|".join(name.encode() + value.cpu().numpy().tobytes() for name, value in sorted(row.items()))


def without_padding(inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each row by itself, [1, T_row]: what padding it has depends on the rows that it stands beside."""
    mask = inputs["attention_mask"].bool()
    for index in range(len(mask)):
        yield {name: value[index : index + 1, mask[index]] for name, value in inputs.items()}


class RowStore:
    """Tensors by key, up to a bound; one that has no room is not kept, and none is evicted.

    A row that was computed beside others can differ in its last bits from the same row computed alone. If rows were
    evicted and computed again, a loss would depend on what had been evicted.

    Args:
        max_bytes: bound on all of them together, on their own device.

    Example:
        >>> import torch
        >>> store = RowStore(8)
        >>> store.put(b"a", torch.ones(2)), store.put(b"b", torch.ones(1)), store.get(b"b") is None
        (True, False, True)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.tensors: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def put(self, key: bytes, tensor: Tensor) -> bool:
        """Keep a tensor; returns whether there was room."""
        size = tensor.numel() * tensor.element_size()
        if self.num_bytes + size > self.max_bytes:
            return False
        self.tensors[key] = tensor
        self.num_bytes += size
        return True

    def get(self, key: bytes) -> Tensor | None:
        """The tensor, or None where it is not kept."""
        return self.tensors.get(key)
