"""Checks of the files of a model's folder, before transformers builds anything from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from zoft.errors import UserError
from zoft.lm.hub import has_cached, not_here, out_of_reach
from zoft.utils.files import at_home

_LARGEST = {"config.json": 1 << 24, "tokenizer.json": 1 << 29, "index": 1 << 27}  # bytes
_MOST_LAYERS = 2000
_LAYERS = re.compile(r"(num_.*layers|n_layers?|.*_layers|depth|num_blocks)")
_MOST_EXPERTS = 100_000
_NEEDED = {"tokenizer.json": ("model",), "adapter_config.json": ("peft_type",)}

INSTEAD = "a folder with config.json and model.safetensors, or zoft:smollm2-135m-instruct (`zoft fetch` brings it)"
"""What a model's name can be where there is no hub."""


def placed(name: str) -> str:
    """Where a model's files are: its folder, that of an asset, or its hub name.

    Args:
        name: a hub name, a folder, or ``zoft:NAME``, which is fetched on first use.

    Raises:
        UserError: what looks like a folder is none, or the hub's name of a model that is neither cached nor in reach.
    """
    if name.startswith("zoft:"):
        from zoft.lm.data.assets import fetch

        return str(fetch(name.removeprefix("zoft:")))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = at_home(name)
    if looks_local and not path.is_dir():
        raise UserError(f"there is no model folder {name} (looked in {Path.cwd()})")
    if path.is_dir():
        return str(path)
    if not has_cached(name) and out_of_reach():
        raise not_here(f"model.name={name}", INSTEAD)
    return name


def check_files(name: str, folder: Path) -> None:
    """Refuse files that are no JSON objects, sizes that no model has, and shards outside of the folder.

    Raises:
        UserError: with the file and what is wrong.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".index.json"):
            _check_shards(file, _read(name, file, _LARGEST["index"]))
        elif file.name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
            read = _read(name, file, _LARGEST["config.json"])
            _check_sizes(name, file, read)
            _check_needed(name, file, read)
        elif file.name == "tokenizer.json":
            _check_needed(name, file, _read(name, file, _LARGEST["tokenizer.json"]))


def _read(name: str, file: Path, largest: int) -> dict[str, Any]:
    try:
        if file.stat().st_size > largest:
            raise ValueError(f"it has {file.stat().st_size:,} bytes, more than {largest:,}")
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except RecursionError:
        raise UserError(f"model.name={name}: {file} is nested too deeply: it is damaged") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.name={name}: {file} cannot be read ({error}): it is damaged") from None
    return content


def _check_needed(name: str, file: Path, read: dict[str, Any]) -> None:
    for key in _NEEDED.get(file.name, ()):
        if not read.get(key):
            raise UserError(f"model.name={name}: {file} has no {key!r}: it is damaged, or not of such a model")


def _check_sizes(name: str, file: Path, read: dict[str, Any]) -> None:
    """A model of a million layers would be built, layer by layer, before anything else is found out about it."""
    for key, value in read.items():
        if isinstance(value, dict):  # text_config and the like
            _check_sizes(name, file, value)
        is_count = isinstance(value, int) and not isinstance(value, bool)
        too_many = is_count and _LAYERS.fullmatch(key) and value > _MOST_LAYERS
        too_many = too_many or (is_count and "expert" in key and value > _MOST_EXPERTS)
        too_long = key == "layer_types" and isinstance(value, list) and len(value) > _MOST_LAYERS
        if too_many or too_long:
            shown = value if is_count else f"{len(value)} entries"
            raise UserError(f"model.name={name}: {file} says {key}={shown}, which no model has: it is damaged")


def _check_shards(file: Path, read: dict[str, Any]) -> None:
    shards = read.get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{file} has no weight_map: it is damaged")
    for shard in set(map(str, shards.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise UserError(f"{file} names a shard {shard!r} outside of its folder: it is refused")
        if not (file.parent / shard).is_file():
            raise UserError(f"{file.parent / shard} is missing, which {file.name} names")
