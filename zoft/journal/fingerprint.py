"""The hash of all rows of a data set, so that a label that was changed between two starts is noticed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from typing import Any

from zoft.utils.lazy import torch
from zoft.utils.random_state import global_random_state_kept

BASE = "_zoft_base"
"""Attribute of a model that knows what its frozen weights are."""

_COMPUTED = {"reference"}  # put into rows by the run itself (zoft/lm/objectives/preference.py)
_MOST = 4096  # rows looked at of a dataset that computes or loads a row when it is asked for it

Feed = Any  # a hashlib object


def know_base(model: Any, fingerprint: str) -> None:
    """Attach a fingerprint of frozen weights to a model whose weights cannot be read later, or dearly."""
    vars(model)[BASE] = fingerprint


def rows_digest(rows: Any) -> str | None:
    """Number of rows and SHA-256 of all of them; None where they cannot be counted or asked for by number.

    Rows that lie in memory (a list, a `datasets.Dataset`) are read whole, about 5 million tokens a second; of another
    kind of dataset, which may compute or download a row, 4096 evenly spaced ones.

    Args:
        rows: a dataset; a dict of datasets gives one digest over all.

    Example:
        >>> rows_digest([{"input_ids": [5, 6], "label": 0}]) == rows_digest([{"input_ids": [5, 6], "label": 1}])
        False
    """
    digest = hashlib.sha256()
    try:
        with global_random_state_kept():  # a row may be drawn at random
            if isinstance(rows, dict):
                count = sum(_feed_rows(digest, rows[name]) for name in sorted(rows))
            else:
                count = _feed_rows(digest, rows)
    except (TypeError, KeyError, NotImplementedError):
        return None
    return f"{count} rows, SHA-256 {digest.hexdigest()[:16]}"


def some_rows_digest(rows: Any) -> str | None:
    """The hash that journals of zoft's first format hold: the number of rows, and a hash of at most 32 of them."""
    try:
        count = len(rows)
        with global_random_state_kept():
            sample = [rows[i] for i in range(0, count, max(1, count // 32))]
    except (TypeError, KeyError, NotImplementedError):
        return None
    plain = [{k: _plain(v) for k, v in row.items()} if isinstance(row, dict) else str(row) for row in sample]
    return f"{count} rows, {hashlib.sha256(json.dumps(plain, default=str).encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _feed_rows(digest: Feed, rows: Any) -> int:
    count = len(rows)
    in_memory = isinstance(rows, list | tuple) or type(rows).__module__.split(".")[0] == "datasets"
    for index in range(0, count, 1 if in_memory else max(1, -(-count // _MOST))):
        row = rows[index]
        if isinstance(row, Mapping):
            row = {key: value for key, value in row.items() if key not in _COMPUTED}
        _feed(digest, row)
    return count


def _feed(digest: Feed, value: Any) -> None:
    """One value, with its kind and length before it, so that no two different ones have the same bytes."""
    kind = type(value)
    if kind is int or kind is bool or kind is float or value is None:
        digest.update(f"{value!r};".encode())
    elif kind is dict or isinstance(value, Mapping):
        digest.update(f"d{len(value)}:".encode())
        for key in value:
            digest.update(f"{key!r}=".encode())
            _feed(digest, value[key])
    elif kind is list or kind is tuple:
        _feed_list(digest, value)
    elif kind is str:
        data = value.encode("utf-8", "surrogatepass")
        digest.update(f"s{len(data)}:".encode() + data)
    elif isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"t{tensor.dtype}{tuple(tensor.shape)}:".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # an array, a picture, bytes of a view
        digest.update(f"a{getattr(value, 'dtype', '')}{getattr(value, 'shape', getattr(value, 'size', ''))}:".encode())
        digest.update(value.tobytes())
    else:
        text = repr(value)
        digest.update((kind.__name__ if " at 0x" in text else text).encode() + b";")


def _feed_list(digest: Feed, value: list[Any] | tuple[Any, ...]) -> None:
    digest.update(f"l{len(value)}:".encode())
    try:
        digest.update(array("q", value).tobytes())  # token ids: all at once
    except (TypeError, OverflowError):
        for each in value:
            _feed(digest, each)
