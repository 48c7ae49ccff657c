"""The name that a base model goes by in another folder or on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def portable_name(name: str) -> str:
    """A base model's name that says the same from every folder.

    A fetched demo base becomes its name on the hub, a folder its absolute path; anything else is a hub name already.

    Args:
        name: a folder, a hub name, or ``zoft:NAME``.

    Example:
        >>> portable_name("zoft:smollm2-135m-instruct"), portable_name("Qwen/Qwen3-0.6B")
        ('HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B')
    """
    from zoft.lm.data.assets import ASSETS
    from zoft.utils.files import cache_dir

    for asset in ASSETS.values():
        cached = (cache_dir() / asset.target).absolute()
        if asset.hub and (name == f"zoft:{asset.name}" or Path(name).expanduser().absolute() == cached):
            return asset.hub
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def without_asking(model: Any) -> dict[str, Any]:
    """What ``save_pretrained`` of a demo base's adapter is told, so that peft asks no hub about its vocabulary.

    Args:
        model: any; of others than a peft model on a demo base nothing is told.
    """
    from zoft.lm.data.assets import ASSETS

    configs = getattr(model, "peft_config", {}) if hasattr(model, "get_base_model") else {}
    demo = {asset.hub for asset in ASSETS.values() if asset.hub}
    ours = any(config.base_model_name_or_path in demo for config in configs.values())
    return {"save_embedding_layers": False} if ours else {}


def is_local(name: str) -> bool:
    """Whether others cannot load it by this name: a folder of this machine."""
    return Path(name).is_absolute()
